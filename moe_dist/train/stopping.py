"""When a run ends: steps, epochs, time, no more improvement, divergence, too many bad steps."""

from __future__ import annotations

import math

from moe_dist.config import TrainConfig
from moe_dist.models.shares import ceil_share


class Stopping:
    """Decides after each step, from numbers every rank agrees on. `reason` is None while the run goes on."""

    def __init__(self, config: TrainConfig, steps_per_epoch: int | None) -> None:
        self.config = config
        self.max_steps = total_steps(config, steps_per_epoch)
        self.best_loss: float | None = None
        self.evaluations_without_improvement = 0
        self.skipped_in_a_row = 0
        self.reason: str | None = None
        self.failed = False

    def after_step(self, step: int, loss: float, epoch: float, skipped: bool, time_share: float) -> None:
        """`step` optimizer steps are done; `time_share` of the time budget has passed."""
        config = self.config
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped and (config.on_nonfinite == "stop" or self.skipped_in_a_row >= config.max_nonfinite_steps):
            times = "" if config.on_nonfinite == "stop" else f" {self.skipped_in_a_row} steps in a row"
            self.stop(
                f"loss or gradient not finite at step {step}{times}; the weights are those before it. "
                "Lower optimizer.learning_rate or look at the data (train.on_nonfinite=skip goes on past it)",
                failed=True,
            )
        elif config.divergence_loss is not None and epoch >= config.divergence_epochs and loss > config.divergence_loss:
            self.stop(
                f"diverged: loss {loss:.4f} is above train.divergence_loss={config.divergence_loss:g} "
                f"after {epoch:.2f} epochs",
                failed=True,
            )
        elif self.max_steps is not None and step >= self.max_steps:
            self.stop(f"all {self.max_steps} steps done")
        elif self.max_steps is None and config.num_train_epochs is not None and epoch >= config.num_train_epochs:
            self.stop(f"the stream has been read {epoch:g} times")
        elif time_share >= 1.0:
            self.stop(f"the time budget of {config.max_time:g} s is used up")

    def after_evaluation(self, loss: float) -> bool:
        """Whether `loss` is the best so far."""
        best = math.inf if self.best_loss is None else self.best_loss
        better = loss < best - self.config.early_stopping_threshold
        self.evaluations_without_improvement = 0 if better else self.evaluations_without_improvement + 1
        is_best = loss < best
        if is_best:
            self.best_loss = loss
        patience = self.config.early_stopping_patience
        if patience and self.evaluations_without_improvement >= patience:
            self.stop(f"validation loss has not improved for {patience} evaluations (best {self.best_loss:.4f})")
        return is_best

    def stop(self, reason: str, failed: bool = False) -> None:
        """End the run after this step, unless it is ending already. `failed`: a person must look at it."""
        if self.reason is None:
            self.reason, self.failed = reason, failed

    def fail(self, reason: str) -> None:
        """The end itself has failed."""
        self.reason, self.failed = reason, True

    def state_dict(self) -> dict[str, float | int | None]:
        return {
            "best_loss": self.best_loss,
            "evaluations_without_improvement": self.evaluations_without_improvement,
        }

    def load_state_dict(self, state: dict) -> None:
        self.best_loss = state["best_loss"]
        self.evaluations_without_improvement = state["evaluations_without_improvement"]


def total_steps(config: TrainConfig, steps_per_epoch: int | None) -> int | None:
    """Optimizer steps of the whole run; None when only time ends it."""
    if config.max_steps > 0:
        return config.max_steps
    if steps_per_epoch is None or config.num_train_epochs is None:
        return None
    return max(1, ceil_share(config.num_train_epochs, steps_per_epoch))
