"""Peak floating-point operations per second of known devices, so that a run has an MFU by itself. No torch."""

from __future__ import annotations

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """Per second and device, by the maker's data sheet: dense, without sparsity."""

    bfloat16: float
    float32: float
    """Without TF32, which PyTorch leaves off."""


PEAKS = {
    "B200": Peak(2250e12, 75e12),
    "GH200": Peak(989e12, 67e12),
    "H200 NVL": Peak(835e12, 60e12),
    "H200": Peak(989e12, 67e12),
    "H100 PCIe": Peak(756e12, 51e12),
    "H100 NVL": Peak(835e12, 60e12),
    "H100": Peak(989e12, 67e12),
    "A100": Peak(312e12, 19.5e12),
    "L40S": Peak(362e12, 91.6e12),
    "L4": Peak(121e12, 30.3e12),
    "A10": Peak(125e12, 31.2e12),
}
"""By a part of the name that `torch.cuda.get_device_name` gives; the first that fits."""


def peak_flops(device_name: str, bf16: bool) -> float | None:
    """For training in bfloat16 or in float32; None for a device that is not known."""
    for name, peak in PEAKS.items():
        if re.search(rf"\b{name}\b", device_name):
            return peak.bfloat16 if bf16 else peak.float32
    return None
