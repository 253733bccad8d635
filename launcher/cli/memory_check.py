"""What cannot fit its machine is refused before a process is started, where the memory of its devices is known."""

from __future__ import annotations

from moe_dist.config import Config, ConfigError
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.state_bytes import state_bytes
from moe_dist.plan.cluster import Cluster, cluster_of
from moe_dist.plan.machine import cuda_devices, host_memory, named_cluster
from moe_dist.plan.search import plan
from moe_dist.plan.words import launch_line
from moe_dist.train.run_summary import byte_size

SMALL = 10**9
"""Bytes that every device and every machine has: nobody is asked."""


def refuse_what_cannot_fit(
    config: Config, path: str, world_size: int, *, here: bool = True, named: bool = False
) -> None:
    """Raises ConfigError naming the nearest layout that fits, for a run whose state alone is more than there is.

    The machine: with `named` what `launch.cluster` says, else this one, on which all ranks start; not `here`: some
    start on others, built alike. Activations are an estimate, and are not held against a run: whatever may fit is
    started. With launch.device=auto it must fit neither the devices nor the host. Nothing is said where memory is not
    known.
    """
    if config.parallel.engine != "torch" or config.parallel.cpu_offload:
        return
    layout = Layout.of(config, world_size)
    held = [state.total for state in state_bytes(config, layout)]
    if sum(held) * layout.dp_size < SMALL:
        return
    cluster = named_cluster(config) if named else None
    if cluster is not None:
        _refuse(config, path, world_size, max(held), f"on a rank of {cluster.name}", cluster)
        return
    found: list[tuple[int, str, Cluster]] = []
    per_host = world_size if here else config.launch.nproc_per_node
    if config.launch.device != "cpu":
        sizes = [size for _, size in cuda_devices()]
        if sizes:
            found.append((max(held), "on a rank", _device_of(min(sizes) / 1e9, per_host)))
        elif config.launch.device == "cuda":
            return
    if not found and not here:
        return
    if config.launch.device != "cuda" and here:
        memory = host_memory()
        if memory is None:
            return
        found.append((sum(held) * layout.dp_size, "on this machine", _device_of(memory / world_size / 1e9, world_size)))
    if all(needed > _room(where, cluster, world_size) for needed, where, cluster in found):
        needed, where, cluster = found[0]
        _refuse(config, path, world_size, needed, where, cluster)


def _room(where: str, cluster: Cluster, world_size: int) -> float:
    return cluster.memory_gb * 1e9 * (world_size if where == "on this machine" else 1)


def _device_of(memory_gb: float, per_host: int) -> Cluster:
    return cluster_of("h100").model_copy(update={"memory_gb": memory_gb, "devices_per_host": per_host})


def _refuse(config: Config, path: str, world_size: int, needed: int, where: str, cluster: Cluster) -> None:
    """Raises ConfigError naming what would fit, as the line that starts it, where that much is not there."""
    room = int(_room(where, cluster, world_size))
    if needed <= room:
        return
    best = plan(config, world_size, cluster, keep=1).best
    nearest = (
        f"no layout fits {world_size} ranks; moe-dist plan {path} says what does"
        if best is None
        else f"this fits: {launch_line(path, best, cluster)}"
    )
    raise ConfigError(
        f"parallel.zero_stage={config.parallel.zero_stage}: weights, gradients and optimizer state take "
        f"{byte_size(needed)} {where}, which has {byte_size(room)}; {nearest}"
    )
