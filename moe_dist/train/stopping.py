"""When a run ends: steps, epochs, time, no more improvement, divergence, too many bad steps."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

from moe_dist.config import TrainConfig
from moe_dist.models.shares import ceil_share
from moe_dist.monitor.records import EvalRecord
from moe_dist.train.callbacks import Callback, RunState

UNLABELLED_STEPS = 100
"""Steps in a row without a label to learn from that end a run."""


class Pace(NamedTuple):
    """What a step and an epoch are, in samples of all replicas."""

    batch: int
    """Samples in one optimizer step."""
    epoch: int | None
    """Samples in one pass over the data; None: a stream, whose length nobody knows."""


class Stopping(Callback):
    """Decides after each step, from numbers every rank agrees on. `reason` is None while the run goes on.

    Epochs are counted in samples. `pace` is that of this start, `first` that of the run's first start: steps of that
    size are the unit of the learning-rate schedule, which so has no jump where the batch changes.
    """

    def __init__(self, config: TrainConfig, pace: Pace) -> None:
        self.config, self.pace, self.first = config, pace, pace
        self.max_steps: int | None = None
        """Number of the last step; None when nothing but time or a stream's end decides."""
        self.go_on(0, 0)
        self.best_loss: float | None = None
        self.evaluations_without_improvement = 0
        self.skipped_in_a_row = self.unlabelled_in_a_row = 0
        self.has_learned = False
        self.reason: str | None = None
        self.failed = False

    def go_on(self, step: int, samples: int) -> None:
        """This start begins after `step` steps and `samples` samples of today's pace."""
        last = last_sample(self.config, self.pace)
        self.max_steps = self.config.max_steps if self.config.max_steps > 0 else None
        if self.max_steps is None and last is not None:
            self.max_steps = step + max(0, math.ceil((last - samples) / self.pace.batch))

    def position(self, step: int, samples: int) -> tuple[float, int | None]:
        """Where the schedule stands after `step` steps and `samples` samples, and its end; both in steps, with epochs
        those of the first start."""
        last, epoch = last_sample(self.config, self.first), self.pace.epoch
        if self.config.max_steps > 0 or last is None or epoch is None:
            return float(step), self.max_steps
        assert self.first.epoch is not None
        unit = Fraction(self.first.batch * epoch, self.first.epoch)
        return float(samples / unit), math.ceil(last / self.first.batch)

    def time_share(self, elapsed: float) -> float:
        """Part of the time budget that has passed after `elapsed` seconds, 0..1; 0 without one."""
        budget = self.config.max_time
        return 0.0 if budget is None else min(1.0, elapsed / budget)

    def before_start(self, step: int, epoch: float, elapsed: float) -> None:
        """A start goes on after `step` steps: is there anything left to do?"""
        self._stop_at_the_end(step, epoch, self.time_share(elapsed))
        if self.reason is None:
            self._stop_without_improvement()

    def _stop_at_the_end(self, step: int, epoch: float, time_share: float) -> None:
        epochs = self.config.num_train_epochs
        if self.max_steps is not None and step >= self.max_steps:
            self.stop(f"all {self.max_steps} steps done")
        elif self.max_steps is None and epochs is not None and epoch >= epochs:
            self.stop(f"the stream has been read {epoch:g} times")
        elif time_share >= 1.0:
            self.stop(f"the time budget of {self.config.max_time:g} s is used up")

    def _stop_without_improvement(self) -> None:
        patience = self.config.early_stopping_patience
        if patience and self.evaluations_without_improvement >= patience:
            self.stop(f"validation loss has not improved for {patience} evaluations (best {self.best_loss:.4f})")

    def on_step_end(self, run: RunState) -> None:
        """Every reason but the validation loss."""
        self.after_step(run.step, run.loss, run.epoch, run.skipped, self.time_share(run.elapsed))
        self.count_labels(run.num_labels)

    def on_evaluate(self, run: RunState, record: EvalRecord) -> None:
        """Early stopping."""
        self.after_evaluation(record.loss)

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
        else:
            self._stop_at_the_end(step, epoch, time_share)

    def count_labels(self, num_labels: int) -> None:
        """The step has had so many labels. One without is no harm, a run of them learns nothing."""
        self.has_learned = self.has_learned or num_labels > 0
        self.unlabelled_in_a_row = 0 if num_labels else self.unlabelled_in_a_row + 1
        if self.unlabelled_in_a_row >= UNLABELLED_STEPS or (self.reason is not None and not self.has_learned):
            self.fail(
                f"{self.unlabelled_in_a_row} steps in a row without a single label to learn from: every token of their "
                "samples is ignored; look at `labels` and `completion_mask` in the data"
            )

    def is_best(self, loss: float) -> bool:
        """Whether no evaluation so far has had a lower loss."""
        return self.best_loss is None or loss < self.best_loss

    def after_evaluation(self, loss: float) -> None:
        """An evaluation has found this validation loss."""
        best = math.inf if self.best_loss is None else self.best_loss
        better = loss < best - self.config.early_stopping_threshold
        self.evaluations_without_improvement = 0 if better else self.evaluations_without_improvement + 1
        if self.is_best(loss):
            self.best_loss = loss
        self._stop_without_improvement()

    def forget_evaluations(self) -> None:
        """Losses on other samples say nothing about those to come."""
        self.best_loss, self.evaluations_without_improvement = None, 0

    def stop(self, reason: str, failed: bool = False) -> None:
        """End the run after this step, unless it is ending already. `failed`: a person must look at it."""
        if self.reason is None:
            self.reason, self.failed = reason, failed

    def fail(self, reason: str) -> None:
        """The end itself has failed."""
        self.reason, self.failed = reason, True

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_loss": self.best_loss,
            "evaluations_without_improvement": self.evaluations_without_improvement,
            "first_pace": list(self.first),
            "has_learned": self.has_learned,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any], saved: Pace) -> None:
        """`saved`: the pace of the start that saved it, which stands for the first in older checkpoints."""
        self.best_loss = state["best_loss"]
        self.evaluations_without_improvement = state["evaluations_without_improvement"]
        self.has_learned = state.get("has_learned", True)
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        first = Pace(*state.get("first_pace", saved))
        # A run that began with a stream has no epoch to count in.
        self.first = first if first.epoch is not None else self.pace


def last_sample(config: TrainConfig, pace: Pace) -> int | None:
    """Number of samples after which epochs end the run; None when they do not, or of a stream.

    Exact: 1.1 epochs of 100 samples are 110.
    """
    if pace.epoch is None or config.num_train_epochs is None:
        return None
    return ceil_share(config.num_train_epochs, pace.epoch)
