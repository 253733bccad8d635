"""The mesh of a trainer that a program has made by itself: its device, and the ranks around it."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_dist.config import Config, ConfigError
from moe_dist.parallel.device import choose_backend, choose_device
from moe_dist.parallel.dispatch_choice import hosts_for
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Mesh


def own_mesh(config: Config) -> Mesh:
    """One process; or in a program that torchrun has started, or that has a process group already, all its ranks.

    A group that is started here stays for whatever the program does next. Raises ConfigError for a layout that these
    ranks cannot have: nothing is started from Python, `moe-dist train` does that.
    """
    started = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if started else _number("WORLD_SIZE", 1)
    rank = dist.get_rank() if started else _number("RANK", 0)
    try:
        layout = Layout.of(config, world_size)
    except ConfigError as error:
        if world_size > 1:
            raise
        raise ConfigError(
            f"{error}; MoETrainer trains in the process it is called in: run `moe-dist train`, start the program with "
            "torchrun --nproc-per-node, or set parallel.ep_size=1 parallel.pp_size=1 parallel.engine=torch"
        ) from None
    device = choose_device(config.launch, rank, _number("LOCAL_RANK", rank % max(1, torch.cuda.device_count())))
    if config.launch.num_threads:
        torch.set_num_threads(config.launch.num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        return Mesh(layout, 0, device)
    if not started:
        backend, timeout = choose_backend(config.launch, device), timedelta(seconds=config.launch.timeout)
        dist.init_process_group(backend, timeout=timeout, device_id=device if backend == "nccl" else None)
    here = _number("LOCAL_WORLD_SIZE", 0) or None
    return Mesh.create(layout, device, config.parallel.shard_size, hosts_for(config, here))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
