"""Layouts on ranks held against one process: `compare` trains both and tells the largest relative differences."""

from __future__ import annotations

from functools import cache
from typing import Any

from ranks import run_ranks
from tiny import difference, train_and_tell

TOLERANCE = 1e-5


@cache
def reference(overrides: tuple[str, ...], num_micro_batches: int, steps: int = 3) -> dict[str, Any]:
    return train_and_tell(overrides, 1, num_micro_batches, steps)


def deviations(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Relative differences by what was compared."""
    worst = {key: difference(found[key], wanted[key]) for key in ("initial", "gradients", "weights", "biases")}
    for key in ("losses", "norms"):
        worst[key] = max(abs(a - b) / abs(b) for a, b in zip(found[key], wanted[key], strict=True))
    return worst


def compare(overrides: tuple[str, ...], ep_size: int, num_micro_batches: int, plant: str | None = None) -> dict:
    wanted = reference(overrides, num_micro_batches)
    results = run_ranks(train_and_tell, 4, overrides, ep_size, num_micro_batches, 3, plant)
    worst: dict[str, float] = {}
    for found in results:
        for key, value in deviations(found, wanted).items():
            worst[key] = max(worst.get(key, 0.0), value)
    return worst
