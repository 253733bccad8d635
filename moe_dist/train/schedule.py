"""Learning rate as a pure function of progress: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from moe_dist.config import OptimizerConfig
from moe_dist.models.shares import ceil_share


def learning_rate(config: OptimizerConfig, step: float, total_steps: int | None, time_share: float = 0.0) -> float:
    """The rate of optimizer step `step` (from 0; not a whole number where a run goes on with another batch).

    Linear warm-up over `warmup_steps` or `warmup_ratio` of the run, then from `learning_rate` to `min_learning_rate`
    in the shape of `lr_scheduler_type`, reached at the end. `time_share` is the part of `max_time` that has
    passed: with a time budget, whichever of steps and time is further says how much of warm-up and of the rest is over.
    """
    peak, floor = config.learning_rate, config.min_learning_rate
    ratio = 0.0 if config.warmup_steps else config.warmup_ratio  # warmup_steps are steps whatever the clock says
    warmup = config.warmup_steps or ceil_share(ratio, total_steps or 0)
    by_steps = (step + 1) / (warmup + 1) if warmup else float(not ratio)
    by_time = time_share / ratio if ratio else 0.0
    if max(by_steps, by_time) < 1.0:
        return peak * max(by_steps, by_time)
    if config.lr_scheduler_type == "constant":
        return peak
    progress = (time_share - ratio) / (1.0 - ratio)
    if total_steps is not None:
        progress = max(progress, (step - warmup) / max(1, total_steps - 1 - warmup))
    progress = min(1.0, max(0.0, progress))
    if config.lr_scheduler_type == "linear":
        return floor + (peak - floor) * (1.0 - progress)
    cycles = round(progress * config.num_cycles, 9)  # 1/49 * 49 is below 1: a restart would come late
    if config.lr_scheduler_type == "cosine_with_restarts" and cycles < config.num_cycles:
        progress = cycles % 1.0
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
