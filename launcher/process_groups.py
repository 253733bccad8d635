"""Connect the ranks: device, backend, time-outs, mesh; and let go of them again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from launcher.environment import STORE, TOKEN, Environment, usable_cores
from launcher.names import wait_for_name
from moe_dist.config import Config
from moe_dist.models.memory import keep_freed_memory
from moe_dist.parallel.device import choose_backend, choose_device
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Mesh

_MOST_THREADS = 4096


def choose_threads(config: Config, environment: Environment) -> int:
    """CPU threads of this rank: as configured, as OMP_NUM_THREADS says, or a fair share of the cores."""
    if config.launch.num_threads:
        return config.launch.num_threads
    # OpenMP takes a number for each level of nesting, and any other text as if it were not there.
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if said.isdecimal() and 0 < int(said) <= _MOST_THREADS:
        return int(said)
    return max(1, usable_cores() // environment.local_world_size)


@contextmanager
def connected(config: Config, environment: Environment) -> Iterator[Mesh]:
    """All ranks connected as the configuration's mesh; groups are destroyed at the end of the block."""
    layout = Layout.of(config, environment.world_size)
    device = choose_device(config.launch, environment.rank, environment.local_rank)
    torch.set_num_threads(choose_threads(config, environment))
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not environment.is_distributed:
        yield Mesh(layout, 0, device)
        return
    backend = choose_backend(config.launch, device)
    timeout = timedelta(seconds=config.launch.timeout)
    wait_for_name(os.environ["MASTER_ADDR"], config.launch.timeout, speaks=environment.local_rank == 0)
    dist.init_process_group(
        backend,
        store=_store(environment, timeout),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
        device_id=device if backend == "nccl" else None,
    )
    # Not in a finally: after an error peers may be gone, and destroying groups would wait for them.
    yield Mesh.create(layout, device, config.parallel.shard_size)
    dist.destroy_process_group()


def _store(environment: Environment, timeout: timedelta) -> dist.Store | None:
    """Where ranks of our own launchers and of srun meet: rank 0 serves, on the socket it was given if it was given one.
    None under torchrun.

    A token keeps ranks of another run, which meet at the same port by mistake, from being taken for ours.
    """
    if STORE not in os.environ and TOKEN not in os.environ:
        return None
    listener = int(os.environ[STORE]) if os.environ.get(STORE) else None
    if listener is not None:
        os.set_inheritable(listener, False)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        environment.world_size,
        is_master=environment.rank == 0,
        timeout=timeout,
        master_listen_fd=listener,
    )
    return dist.PrefixStore(os.environ.get(TOKEN, "moe-dist"), store)
