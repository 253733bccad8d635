"""Layouts on ranks held against one process: `compare` trains both and tells the largest relative differences."""

from __future__ import annotations

from functools import cache

from ranks import run_ranks
from tiny import mesh_of, tiny_config

from moe_dist.verify.trial import Told, deviations, run_trial


@cache
def reference(overrides: tuple[str, ...], num_micro_batches: int) -> Told:
    """One process."""
    return told(overrides, 1, num_micro_batches)


def told(overrides: tuple[str, ...], ep_size: int, num_micro_batches: int, plant: str | None = None) -> Told:
    """What this rank is told of three steps of the tiny model."""
    config = tiny_config(f"parallel.ep_size={ep_size}", *overrides)
    return run_trial(config, mesh_of(ep_size, config.parallel.shard_size), num_micro_batches, plant=plant)


def compare(
    overrides: tuple[str, ...], ep_size: int, num_micro_batches: int, plant: str | None = None
) -> dict[str, float]:
    """Largest deviations of any of four ranks from one process."""
    wanted = reference(overrides, num_micro_batches)
    found = [
        deviations(result, wanted) for result in run_ranks(told, 4, overrides, ep_size, num_micro_batches, plant)
    ]
    return {name: max(worst[name] for worst in found) for name in found[0]}
