"""Full precision: float32, or float64 where torch's default dtype is that, as in `moe_dist/verify`.

In float32 two layouts differ by rounding, up to 5e-5 and now and then by a near-tie of the router that goes the other
way; in float64 they agree to thirteen digits, so that whatever is left is a mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def full_dtype() -> torch.dtype:
    """float32, or float64 inside `in_dtype(torch.float64)`."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def full(tensor: Tensor) -> Tensor:
    """`tensor` in full precision, whatever the model computes in; itself when it is already."""
    return tensor.to(full_dtype())


@contextmanager
def in_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new floating-point tensors, and all that is in full precision, are of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
