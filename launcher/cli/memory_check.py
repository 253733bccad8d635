"""What cannot fit this machine is refused before a process is started, where the memory of its devices is known."""

from __future__ import annotations

import subprocess

from moe_dist.config import Config, ConfigError
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.state_bytes import state_bytes
from moe_dist.plan.cluster import cluster_of
from moe_dist.plan.search import plan
from moe_dist.plan.words import launch_line
from moe_dist.train.run_summary import byte_size


def cuda_memory() -> int | None:
    """Bytes of the smallest device here, as its driver says; None where nobody can tell."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return min(int(line) for line in said.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def host_memory() -> int | None:
    """Bytes of memory and swap of this machine; None where nobody can tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split()[:2] for line in file)
        return 1024 * (int(sizes["MemTotal:"]) + int(sizes["SwapTotal:"]))
    except (OSError, KeyError, ValueError):
        return None


def refuse_what_cannot_fit(config: Config, path: str, world_size: int) -> None:
    """Raises ConfigError naming the nearest layout that fits, for a run of this machine whose state alone is more than
    there is.

    Activations are an estimate, and are not held against a run: whatever may fit is started. With launch.device=auto it
    must fit neither the devices nor the host.
    """
    if config.parallel.engine != "torch" or config.parallel.cpu_offload:
        return
    layout = Layout.of(config, world_size)
    held = [state.total for state in state_bytes(config, layout)]
    here: list[tuple[str, int, int | None]] = []
    if config.launch.device != "cpu":
        here.append(("on a rank", max(held), cuda_memory()))
    if config.launch.device != "cuda":
        here = [one for one in here if one[2] is not None]
        here.append(("on this machine", sum(held) * layout.dp_size, host_memory()))
    if any(memory is None or needed <= memory for _, needed, memory in here):
        return
    where, needed, there = here[0]
    memory = there or 0
    raise ConfigError(
        f"parallel.zero_stage={config.parallel.zero_stage}: weights, gradients and optimizer state take "
        f"{byte_size(needed)} {where}, which has {byte_size(memory)}; "
        + _nearest(config, path, world_size, memory if where == "on a rank" else memory // world_size)
    )


def _nearest(config: Config, path: str, world_size: int, memory: int) -> str:
    """What would fit in so many bytes for each rank, as the line that starts it."""
    machine = {"memory_gb": memory / 1e9, "devices_per_host": world_size}
    best = plan(config, world_size, cluster_of("h100").model_copy(update=machine), keep=1).best
    if best is None:
        return f"no layout fits {world_size} ranks; moe-dist plan {path} says what does"
    return f"this fits: {launch_line(path, best, cluster_of('h100').model_copy(update=machine))}"
