"""What is wrong with a run, from its records: the same rules while it runs, in `moe-dist doctor` and in the report.

Every rule compares a run with itself (medians of its own past) and needs a condition to last, so that noise is no
finding; what has passed is history. docs/metrics.md states them. Imports no torch.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque

from moe_dist.monitor.health.advice import Advice
from moe_dist.monitor.health.pace import Pace
from moe_dist.monitor.health.rules import LONG_PATIENCE, PATIENCE, Conditions, Finding, Health
from moe_dist.monitor.records import CheckpointRecord, EvalRecord, LayerRecord, RunInfo, TrainRecord

WINDOW = 20
"""Intervals of the past that a loss is compared with."""
SPIKE_SPREAD, SPIKE_SHARE = 8.0, 0.1
"""A spike is above the window's median by 8 standard deviations of the noise and by 10 %."""
DIVERGED = 1.25
"""Median of the last ten losses / lowest such median before."""
FLAT_AFTER, FLAT = 30, 0.99
"""Intervals, and last median / first median, that make a loss flat."""
LARGE_NORM = 10.0
"""Norm of the gradient of a mean over tokens, before clipping, that a run in good health has left behind early."""
BLOCKED = 0.1
"""Share of the time between two checkpoints in which training waited for one."""
OVERFITTED, RISING = 1.05, 1.01
"""Last validation loss / best; the same when it has risen in each of the last PATIENCE evaluations."""
APART = 0.25
"""(Validation loss - training loss) / training loss of a model that learns its training data by heart."""


class Diagnosis:
    """Takes the records of a run one after the other and gives what each of them adds.

    `present` has what is so now, `past` what is over.
    """

    def __init__(self) -> None:
        self._of_model = Conditions()
        self._advice = Advice()
        self.health = Health(conditions=self._of_model)
        self.pace = Pace(Conditions(self._of_model.past))
        self._layers: list[LayerRecord] = []
        self._repeats = 0
        self._saved_at: float | None = None
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=LONG_PATIENCE)
        self._first: list[float] = []
        self._first_step, self._from_the_start = 0, True
        self._intervals = 0
        self._lowest = math.inf
        self._evals: list[tuple[float, float]] = []
        self._skipped, self._quiet = 0, 0
        self._step: int | None = None

    @property
    def present(self) -> list[Finding]:
        """What is so now, in the order in which it was found."""
        found = [*self._of_model.present.values(), *self.pace.conditions.present.values()]
        return sorted(found, key=lambda finding: finding.step or 0)

    @property
    def past(self) -> list[Finding]:
        """What is over, as history."""
        return list(self._of_model.past)

    def resumed(self, info: RunInfo) -> None:
        """A start of the run: the machines may be others, the model and its loss are the same."""
        self._advice = self.health.advice = Advice(info.config_text)
        self.pace.resumed(info, self._advice, self._step)
        self._saved_at = None

    def train(self, record: TrainRecord) -> list[Finding]:
        """A logging interval. One that was logged without its layers (`monitor.detail_steps`) had the same troubles as
        the one before.
        """
        self._step = record.step
        if record.layers:
            self._layers, self._repeats = record.layers, 0
        self._repeats += 1
        # What lasts is a finding by then; to go on would cost more than all the rest.
        layers = self._layers if self._repeats <= LONG_PATIENCE + 1 else []
        found = self.health.observe(layers, record.step, record.max_steps)
        found += self._loss(record)
        found += self.pace.observe(record)
        return found

    def _loss(self, record: TrainRecord) -> list[Finding]:
        found, loss, step, watch = [], record.loss, record.step, self._of_model.observe
        rate_key, slower, warm_up = "optimizer.learning_rate", self._advice.learning_rate, self._advice.warm_up

        def not_finite() -> Finding:
            words = f"the loss is not finite; {slower}, or {warm_up}"
            return Finding("loss_not_finite", "critical", words, rate_key, step)

        found += watch("not finite", not math.isfinite(loss), 1, step, not_finite)
        found += self._skips(record)
        if not math.isfinite(loss):
            return found
        found += self._spike(loss, step)
        norms = [norm for norm in record.steps.get("grad_norm", []) if math.isfinite(norm)] or [record.grad_norm]
        self._norms.append(statistics.median(norms))
        norm = statistics.median(self._norms)

        def large() -> Finding:
            words = (
                f"the gradient's norm is above {LARGE_NORM:g}: {norm:.1f} in the middle of the last {LONG_PATIENCE} "
                f"intervals; {slower}, or {warm_up}, and look at the data"
            )
            return Finding("gradient_norm", "warning", words, rate_key, step, evidence={"grad_norm": norm})

        long_enough = len(self._norms) == LONG_PATIENCE
        found += watch("gradient", long_enough and norm > LARGE_NORM, 1, step, large)
        self._losses.append(loss)
        self._intervals += 1
        if len(self._first) < 3:
            # A run that goes on from a checkpoint may be near its end, where the loss hardly moves.
            self._from_the_start &= len(self._first) != 1 or 2 * self._first_step <= step
            self._first_step = self._first_step or step
            self._first.append(loss)
        return found + (self._course(record) if self._intervals >= LONG_PATIENCE else [])

    def _skips(self, record: TrainRecord) -> list[Finding]:
        """The number goes on over restarts, and back with a checkpoint."""
        more, self._skipped = record.skipped_steps > self._skipped, record.skipped_steps
        watch, key = self._of_model, "skipped"
        if key in watch.present or more:
            # Of events, the last ones count: the condition stays until there has been none for a while.
            finding = Finding(
                "skipped_steps",
                "warning",
                f"{record.skipped_steps} steps were skipped for a loss or gradient that was not finite; "
                f"{self._advice.learning_rate}",
                "optimizer.learning_rate",
                record.step,
                evidence={"skipped_steps": float(record.skipped_steps)},
            )
            self._quiet = 0 if more else self._quiet + 1
            if self._quiet >= LONG_PATIENCE:
                watch.end(key, record.step)
            elif key not in watch.present:
                return [watch.begin(key, finding)]
            elif more:
                watch.present[key] = finding
        return []

    def _spike(self, loss: float, step: int) -> list[Finding]:
        past = list(self._losses)
        if len(past) < WINDOW // 2:
            return []
        median = statistics.median(past)
        # Of neighbours' differences, so that a loss on its way down is no scatter.
        jumps = [abs(after - before) for before, after in itertools.pairwise(past)]
        spread = 1.4826 * statistics.median(jumps) / math.sqrt(2)
        limit = median + max(SPIKE_SPREAD * spread, SPIKE_SHARE * abs(median))

        def spike() -> Finding:
            clip = self._advice.change("train.max_grad_norm", 0.5)
            words = (
                f"the loss jumped from {median:.4f} to {loss:.4f}; if it happens again {self._advice.learning_rate} "
                f"or {clip}"
            )
            numbers = {"loss": loss, "median": median, "limit": limit}
            return Finding("loss_spike", "warning", words, "optimizer.learning_rate", step, evidence=numbers)

        return self._of_model.observe("spike", loss > limit, 1, step, spike)

    def _course(self, record: TrainRecord) -> list[Finding]:
        """Where the loss goes over many intervals."""
        step, key = record.step, "optimizer.learning_rate"
        recent = statistics.median(list(self._losses)[-LONG_PATIENCE:])
        lowest, start = self._lowest, statistics.median(self._first)

        def diverges() -> Finding:
            set_already = self._advice.value("train.divergence_loss")
            words = (
                f"the loss has risen from {lowest:.4f} to {recent:.4f} and stays there: training diverges; go back to "
                f"a checkpoint and {self._advice.learning_rate}{'' if set_already else ', set train.divergence_loss'}"
            )
            return Finding("divergence", "critical", words, key, step, evidence={"loss": recent, "lowest": lowest})

        def flat() -> Finding:
            words = (
                f"the loss has hardly moved in {step} steps, {start:.4f} to {recent:.4f}; "
                f"{self._advice.change(key, 2.0)} (is the warm-up over?), and look at the data"
            )
            numbers = {"first": start, "loss": recent, "learning_rate": record.learning_rate}
            return Finding("flat_loss", "warning", words, key, step, evidence=numbers)

        found = self._of_model.observe("diverged", lowest > 0 and recent > DIVERGED * lowest, PATIENCE, step, diverges)
        self._lowest = min(lowest, recent)
        is_flat = self._from_the_start and FLAT * start <= recent <= DIVERGED * start
        return found + self._of_model.observe("flat", is_flat and self._intervals >= FLAT_AFTER, 1, step, flat)

    def evaluation(self, record: EvalRecord) -> list[Finding]:
        """An evaluation."""
        recent, step, key = list(self._losses)[-5:], record.step, "train.early_stopping_patience"
        self._evals.append((record.loss, statistics.median(recent) if recent else math.nan))
        best, training_then = min(self._evals)
        loss, training_now = self._evals[-1]
        last = [value for value, _ in self._evals[-PATIENCE - 1 :]]
        climbs = len(last) > PATIENCE and all(after > before for before, after in itertools.pairwise(last))
        numbers = {"loss": loss, "best": best, "training_loss": training_now, "training_loss_then": training_then}
        advice = self._advice.stopping

        def rises() -> Finding:
            kind, words = "validation_rising", f"validation loss rose from {best:.4f} to {loss:.4f}; {advice}"
            if training_now < training_then:
                kind = "overfitting"
                words = (
                    f"validation loss rose from {best:.4f} to {loss:.4f} while training loss fell from "
                    f"{training_then:.4f} to {training_now:.4f}: overfitting; {advice}"
                )
            return Finding(kind, "warning", words, key, step, evidence=numbers)

        def apart() -> Finding:
            words = (
                f"validation loss {loss:.4f} no longer follows training loss {training_now:.4f}: it has not fallen in "
                f"{PATIENCE} evaluations, training loss has; {advice}"
            )
            return Finding("validation_diverging", "warning", words, key, step, evidence=numbers)

        rising = loss > OVERFITTED * best or (climbs and loss > RISING * best)
        found = self._of_model.observe("overfitting", rising, 1, step, rises)
        earlier = [value for value, _ in self._evals[:-PATIENCE]]
        stuck = bool(earlier) and min(value for value, _ in self._evals[-PATIENCE:]) >= min(earlier)
        fell = bool(earlier) and training_now < self._evals[-PATIENCE - 1][1]
        is_apart = not rising and stuck and fell and loss > (1 + APART) * training_now
        return found + self._of_model.observe("apart", is_apart, 1, step, apart)

    def checkpoint(self, record: CheckpointRecord, moment: float) -> list[Finding]:
        """A checkpoint that ended at `moment`, seconds since 1970."""
        if not record.ok:
            words = f"a checkpoint could not be written: {record.reason}"
            finding = Finding("checkpoint_failed", "critical", words, "checkpoint.on_failure", record.step)
            return [self._of_model.begin(("checkpoint", record.step), finding)]
        for failed in [name for name in self._of_model.present if isinstance(name, tuple) and name[0] == "checkpoint"]:
            self._of_model.end(failed, record.step)
        before, self._saved_at = self._saved_at, moment
        if before is None:
            return []
        between = moment - before
        if between < record.blocked_seconds:  # clocks that do not fit together
            return []
        share = record.blocked_seconds / max(between, 1e-9)

        def slow() -> Finding:
            key, remedy = self._advice.saving
            each = f"{record.blocked_seconds:.1f} s each"
            words = f"training waits for checkpoints {share:.0%} of the time ({each}); {remedy}"
            numbers = {"blocked_seconds": record.blocked_seconds, "seconds_between": between}
            return Finding("slow_checkpoint", "warning", words, key, record.step, evidence=numbers)

        return self.pace.conditions.observe("slow checkpoint", share > BLOCKED, 2, record.step, slow)
