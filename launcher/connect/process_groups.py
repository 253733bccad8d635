"""Connect the ranks: device, backend, time-outs, mesh; and let go of them again."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from launcher.connect.environment import STORE, TOKEN, Environment, usable_cores
from launcher.connect.gate import LOOPBACK, Gate, Tunnel, served_at
from launcher.connect.handshake import listen
from launcher.connect.host_names import wait_for_name
from launcher.connect.secret import job_secret
from moe_dist.config import Config, ConfigError
from moe_dist.models.malloc_tuning import keep_freed_memory
from moe_dist.parallel.device import choose_backend, choose_device
from moe_dist.parallel.dispatch_choice import hosts_for
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
    if config.parallel.layout == "auto" or config.parallel.elastic:
        _agree_on_the_layout(config, device)
    # Not in a finally: after an error peers may be gone, and destroying groups would wait for them.
    hosts = hosts_for(config, environment.local_world_size)
    yield Mesh.create(layout, device, config.parallel.shard_size, hosts)
    # A rank that leaves with a code other than 0 makes mpirun end the others: not before they have had their say.
    dist.barrier()
    dist.destroy_process_group()


def _agree_on_the_layout(config: Config, device: torch.device) -> None:
    """Raises ConfigError where ranks have chosen different layouts, each by its own host's devices (collective)."""
    parallel, train = config.parallel, config.train
    chosen = (
        *(parallel.ep_size, parallel.pp_size, parallel.schedule, parallel.stages, parallel.zero_stage),
        *(parallel.shard_size, train.per_device_train_batch_size, train.gradient_accumulation_steps),
        train.gradient_checkpointing,
    )
    number = zlib.crc32(repr(chosen).encode())
    most_and_least = torch.tensor([number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(most_and_least, dist.ReduceOp.MAX)
    most, least = most_and_least.tolist()
    if most != -least:
        raise ConfigError(
            "parallel.layout: hosts with different devices have chosen different layouts, here "
            f"pp_size={parallel.pp_size} ep_size={parallel.ep_size} zero_stage={parallel.zero_stage}; say what they "
            "are planned for, the same on each: launch.cluster"
        )


def _store(environment: Environment, timeout: timedelta) -> dist.Store | None:
    """Where ranks meet: a store of rank 0, or of the first agent, on loopback.

    Those of other machines come to it through a gate, with the job's secret. None where torchrun's own agent has
    started them, which has a store of its own.

    A token keeps ranks of another run, which meet at the same port by mistake, from being taken for ours.
    """
    token = os.environ.get(TOKEN)
    if token is None and "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    name = token or "moe-dist"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = socket.socket(fileno=int(os.environ[STORE])) if os.environ.get(STORE) else None
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if environment.local_world_size == environment.world_size and not by_agent:
        if environment.rank == 0 and listener is None:
            listener = _listen(LOOPBACK, port)
        store = loopback_store(port, listener, timeout)
    elif environment.rank == 0 and not by_agent:
        inner = listen(LOOPBACK)
        store = loopback_store(inner.getsockname()[1], inner, timeout)
        Gate(listener or _listen(served_at(host), port), job_secret(), f"store {name}", store.port)
    else:
        tunnel = Tunnel(host, port, job_secret(), f"store {name}", timeout.total_seconds())
        store = loopback_store(tunnel.port, None, timeout)
    if by_agent:  # it stays when ranks are started again
        name += f"/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return dist.PrefixStore(name, store)


def loopback_store(port: int, listener: socket.socket | None, timeout: timedelta) -> dist.TCPStore:
    """A store that only this machine reaches: served on `listener`, or by somebody else at `port`."""
    number = None
    if listener is not None:
        number = listener.detach()
        os.set_inheritable(number, False)
    return dist.TCPStore(
        LOOPBACK,
        port,
        is_master=number is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=number,
    )


def _listen(address: str, port: int) -> socket.socket:
    try:
        return listen(address, port)
    except OSError as error:
        raise ConfigError(f"MASTER_PORT={port}: {address} cannot listen there: {error.strerror}") from error
