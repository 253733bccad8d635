"""Which kernels move rows and compute gated units: PyTorch's own, or those of `triton_kernels`. Imports no torch."""

from __future__ import annotations

import os
from importlib.util import find_spec

from moe_dist.config import ConfigError


def require_kernels(kernels: str, device: str) -> None:
    """Raises ConfigError where `train.kernels` cannot run on a device of this kind ("cpu", "cuda")."""
    if kernels == "torch":
        return
    said = f"train.kernels={kernels}"
    if find_spec("triton") is None:
        raise ConfigError(
            f"{said}: Triton is not installed; PyTorch for CUDA brings it, elsewhere on Linux pip install triton, or "
            "take train.kernels=torch"
        )
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"{said}: these are kernels of GPUs, and this device is a CPU; take train.kernels=torch, or try them with "
            "TRITON_INTERPRET=1 in the environment, a thousand times slower"
        )
