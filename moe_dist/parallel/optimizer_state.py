"""The state of a torch optimizer before its first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def at_rest(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A step of zero gradients inside moves nothing and counts for nothing: it allocates the state."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    yield
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif key == "step":  # Adafactor counts in a number, which cannot be read into
                state[key] = torch.zeros(())
