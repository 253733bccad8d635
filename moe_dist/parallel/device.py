"""Where this rank computes, and what it communicates with."""

from __future__ import annotations

import torch

from moe_dist.config import LaunchConfig


def choose_device(launch: LaunchConfig, rank: int = 0, local_rank: int = 0) -> torch.device:
    """The device of a rank. Raises ValueError when CUDA is asked for and missing."""
    wanted = launch.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not available:
        raise ValueError("launch.device=cuda: this machine has no CUDA device; set launch.device=cpu, or auto")
    if local_rank >= available and launch.backend == "gloo":
        return torch.device("cuda", local_rank % available)  # NCCL takes one rank per device, gloo does not mind
    if local_rank >= available:
        raise ValueError(
            f"launch.device={wanted}: rank {rank} needs CUDA device {local_rank}, this machine has {available}; start "
            f"at most {available} ranks here, set launch.backend=gloo to let them share one, or launch.device=cpu"
        )
    return torch.device("cuda", local_rank)


def choose_backend(launch: LaunchConfig, device: torch.device) -> str:
    """The collective library: as configured, or the one for the device. Raises ValueError for NCCL without CUDA."""
    if launch.backend == "nccl" and device.type != "cuda":
        raise ValueError("launch.backend=nccl: this machine has no CUDA device; set launch.backend=gloo, or auto")
    if launch.backend != "auto":
        return launch.backend
    return "nccl" if device.type == "cuda" else "gloo"


def set_deterministic(deterministic: bool, compiles: bool) -> None:
    """Only deterministic kernels, or any. torch's own switch loads its compiler, for seconds, even to say no."""
    if deterministic and compiles:
        torch.use_deterministic_algorithms(True)
    else:
        torch.set_deterministic_debug_mode("error" if deterministic else "default")
