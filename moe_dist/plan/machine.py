"""The machine that a run file is for: what `launch.cluster` names, or the devices that are here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from moe_dist.config import Config, ConfigError
from moe_dist.plan.cluster import DEVICES, Cluster, cluster_of


def cuda_devices() -> list[tuple[str, int]]:
    """Name and bytes of each device here, as the driver says; empty where nobody can tell."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        pairs = [line.rpartition(",") for line in said.splitlines() if line.strip()]
        return [(name.strip(), int(size) * 2**20) for name, _, size in pairs]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def device_kind(config: Config) -> str:
    """ "cuda" or "cpu": where ranks would compute that are started on this machine."""
    wanted = config.launch.device
    return "cuda" if wanted == "cuda" or (wanted == "auto" and cuda_devices()) else "cpu"


def host_memory() -> int | None:
    """Bytes of memory and swap of this machine; None where nobody can tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split()[:2] for line in file)
        return 1024 * (int(sizes["MemTotal:"]) + int(sizes["SwapTotal:"]))
    except (OSError, KeyError, ValueError):
        return None


def named_cluster(config: Config) -> Cluster | None:
    """What `launch.cluster` says; None where it says nothing. Raises ConfigError where it cannot be read."""
    wanted = config.launch.cluster
    if wanted is None:
        return None
    if wanted in DEVICES:
        return cluster_of(wanted)
    if not Path(wanted).is_file():
        raise ConfigError(f"launch.cluster={wanted}: one of {', '.join(DEVICES)}, or a file (docs/planning.md)")
    return cluster_of(None, wanted)


def machine_of(config: Config, per_host: int) -> Cluster | None:
    """Where a run trains with `per_host` ranks on each host; None where its devices are not known.

    The same on every host that is built alike: memory is that of the data sheet, or whole GB of a host.
    """
    named = named_cluster(config)
    if named is not None:
        return named
    cuda = cuda_devices() if config.launch.device != "cpu" else []
    if cuda:
        name, size = min(cuda, key=lambda device: device[1])
        known = _known(name)
        if known is None:
            return None
        memory = min(known.memory_gb, size / 1e9)
        return known.model_copy(update={"memory_gb": memory, "devices_per_host": per_host})
    if config.launch.device == "cuda":
        return None
    host = host_memory()
    if host is None:
        return None
    each = max(1.0, host // 10**9 / per_host)
    return cluster_of("cpu").model_copy(update={"memory_gb": each, "devices_per_host": per_host})


def cluster_of_device(config: Config, name: str, per_host: int) -> Cluster:
    """Where a run has trained that calls its device so: what `launch.cluster` says, else what the name means.

    Raises ConfigError for a device that is not known.
    """
    found = named_cluster(config) or _known(name)
    if found is None:
        raise ConfigError(f"device {name}: not known; --cluster FILE says what it is (docs/planning.md)")
    return found.model_copy(update={"devices_per_host": per_host})


def _known(name: str) -> Cluster | None:
    """By the name that a driver gives a device."""
    for device in DEVICES:
        if re.search(rf"\b{device}\b", name, re.IGNORECASE):
            return cluster_of(device)
    return None
