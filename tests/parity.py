"""Layouts on ranks held against one process: `compare` trains both and tells the largest relative differences."""

from __future__ import annotations

from functools import cache

import torch.distributed as dist
from ranks import run_ranks
from tiny import mesh_of, tiny_config

from moe_dist.config import Config
from moe_dist.parallel.mesh import Mesh
from moe_dist.verify.scenarios import Precision
from moe_dist.verify.trial import TrialResult, deviations, run_trial

TOLERANCE = 1e-5
"""Relative, of the tensor that differs most. In float64 rounding is eight digits below."""


def passes(worst: dict[str, float]) -> bool:
    """Whether everything is within the tolerance, and initial weights are equal."""
    return worst["initial"] == 0.0 and max(worst.values()) < TOLERANCE


@cache
def reference(overrides: tuple[str, ...], num_micro_batches: int, precision: Precision) -> TrialResult:
    """One process."""
    return told(overrides, 1, num_micro_batches, precision=precision)


def told(
    overrides: tuple[str, ...],
    ep_size: int,
    num_micro_batches: int,
    pp_size: int = 1,
    precision: Precision = "float64",
) -> TrialResult:
    """What this rank is told of three steps of the tiny model."""
    config, mesh = on_layout(overrides, ep_size, num_micro_batches, pp_size)
    return run_trial(config, mesh, num_micro_batches, precision=precision)


def on_layout(
    overrides: tuple[str, ...], ep_size: int, num_micro_batches: int, pp_size: int = 1
) -> tuple[Config, Mesh]:
    """The tiny model's configuration and this rank's mesh."""
    replicas = dist.get_world_size() // pp_size if dist.is_initialized() else 1
    layout = [
        f"parallel.ep_size={ep_size}",
        f"parallel.pp_size={pp_size}",
        f"train.gradient_accumulation_steps={num_micro_batches // replicas}",
    ]
    config = tiny_config(*layout, *overrides)
    return config, mesh_of(ep_size, config.parallel.shard_size, pp_size)


def compare(overrides: tuple[str, ...], ep_size: int, num_micro_batches: int, pp_size: int = 1) -> dict[str, float]:
    """Largest deviations of any of four ranks from one process. One reference serves all layouts of a pipeline."""
    in_float32 = any(word in text for text in overrides for word in ("deepspeed", "bf16"))
    precision: Precision = "float32" if in_float32 else "float64"
    plain = tuple(text for text in overrides if not text.startswith("parallel."))
    wanted = reference(plain, num_micro_batches, precision)
    results = run_ranks(told, 4, overrides, ep_size, num_micro_batches, pp_size, precision)
    found = [deviations(result, wanted) for result in results]
    return {name: max(worst[name] for worst in found) for name in found[0]}
