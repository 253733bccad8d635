"""What a run has done so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_dist.train.step import StepResult


@dataclass
class Counters:
    """What a run has done so far, over all its starts."""

    step: int = 0
    """Optimizer steps finished."""
    tokens: int = 0
    """Tokens consumed, all ranks."""
    skipped: int = 0
    """Steps skipped for a non-finite loss or gradient."""
    elapsed: float = 0.0
    """Seconds of training."""
    initial_loss: float | None = None
    """Loss of the first step ever."""
    final_loss: float | None = None
    """Loss of the last step that had one."""
    saves_failed: int = 0
    """Checkpoints that could not be committed."""

    def add(self, result: StepResult) -> None:
        """One more step."""
        self.step += 1
        self.tokens += result.num_tokens
        self.skipped += result.skipped
        if self.initial_loss is None and result.num_labels:
            self.initial_loss = result.loss
        if result.num_labels and math.isfinite(result.loss):
            self.final_loss = result.loss
