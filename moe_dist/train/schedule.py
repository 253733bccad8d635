"""Learning rate as a pure function of progress: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from moe_dist.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int | None, time_share: float = 0.0) -> float:
    """The rate of optimizer step `step` (from 0).

    Linear warm-up over `warmup_steps` (or `warmup_ratio` of `total_steps`), then from `learning_rate` to
    `min_learning_rate` in the shape of `lr_scheduler_type`, reached at the last step. `time_share` is the part of
    `max_time` that has passed: with a time budget, progress is whichever of steps and time is further.
    """
    peak, floor = config.learning_rate, config.min_learning_rate
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.lr_scheduler_type == "constant":
        return peak
    progress = time_share
    if total_steps is not None:
        progress = max(progress, (step - warmup) / max(1, total_steps - 1 - warmup))
    progress = min(1.0, progress)
    if config.lr_scheduler_type == "linear":
        return floor + (peak - floor) * (1.0 - progress)
    if config.lr_scheduler_type == "cosine_with_restarts" and progress < 1.0:
        progress = (progress * config.num_cycles) % 1.0
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_steps(config: OptimizerConfig, total_steps: int | None) -> int:
    """Steps of warm-up: warmup_steps, else warmup_ratio of the whole run."""
    if config.warmup_steps:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * total_steps) if total_steps else 0
