"""What is wrong with a run, from its records: the same rules while it runs, in `moe-dist doctor` and in the report.

Every rule compares a run with itself (medians of its own past) and needs a condition to last, so that noise is no
finding; docs/metrics.md states them. Imports no torch.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Sequence

from moe_dist.monitor.health import LONG_PATIENCE, PATIENCE, Finding, Health, Lasting
from moe_dist.monitor.rank_facts import PHASE_KEYS
from moe_dist.monitor.records import CheckpointRecord, EvalRecord, RanksRecord, TrainRecord

WINDOW = 20
"""Intervals of the past that a loss is compared with."""
SPIKE_SPREAD, SPIKE_SHARE = 8.0, 0.1
"""A spike is above the window's median by 8 standard deviations of the noise and by 10 %."""
DIVERGED = 1.25
"""Median of the last ten losses / lowest such median before."""
FLAT_AFTER, FLAT = 30, 0.99
"""Intervals, and last median / first median, that make a loss flat."""
STARVED = 0.2
"""Share of step time waiting for a batch."""
TALKATIVE = 0.5
"""Share of step time in all-to-all."""
LOW_MFU = 0.1
LARGE_NORM = 10.0
"""Norm of the gradient of a mean over tokens, before clipping, that a run in good health has left behind early."""
BLOCKED = 0.1
"""Share of the time between two checkpoints in which training waited for one."""
OVERFITTED = 1.05
"""Last validation loss / best."""
UNEQUAL_ROWS = 1.5
"""Rows of a straggler / median of the others from which on its load is the likelier cause."""


class Diagnosis:
    """Takes the records of a run one after the other and gives what each of them adds."""

    def __init__(self, hosts: Sequence[str] = (), stages: Sequence[int] = ()) -> None:
        """`hosts` and `stages`: host and pipeline stage of each rank."""
        self.health = Health()
        self._lasting = Lasting()
        self._skipped = 0
        self.resumed(hosts, stages)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._first: list[float] = []
        self._first_step, self._from_the_start = 0, True
        self._intervals = 0
        self._lowest = math.inf
        self._evals: list[tuple[float, float]] = []

    def resumed(self, hosts: Sequence[str], stages: Sequence[int] = ()) -> None:
        """A start of the run: the machines may be others, the model and its loss are the same."""
        self.hosts, self.stages = list(hosts), list(stages)
        self._pace = Lasting()
        self._stragglers: set[int] = set()
        self._saved_at: float | None = None
        self._skipped_told = False

    def train(self, record: TrainRecord) -> list[Finding]:
        """A logging interval."""
        found = self.health.observe(record.layers, record.step)
        found += self._loss(record)
        found += self._speed(record)
        found += self._straggling(record)
        return found

    def _loss(self, record: TrainRecord) -> list[Finding]:
        found, loss, step = [], record.loss, record.step
        if self._lasting.reaches("not finite", not math.isfinite(loss), 1):
            words = "the loss is not finite; lower optimizer.learning_rate or lengthen the warm-up"
            found.append(Finding("loss_not_finite", "critical", words, "optimizer.learning_rate", step))
        if record.skipped_steps > self._skipped and not self._skipped_told:
            words = (
                f"{record.skipped_steps} steps were skipped for a loss or gradient that was not finite; lower "
                "optimizer.learning_rate"
            )
            numbers = {"skipped_steps": float(record.skipped_steps)}
            found.append(Finding("skipped_steps", "warning", words, "optimizer.learning_rate", step, evidence=numbers))
            self._skipped_told = True
        self._skipped = record.skipped_steps  # goes on over restarts, and back with a checkpoint
        if not math.isfinite(loss):
            return found
        past = list(self._losses)
        if len(past) >= WINDOW // 2:
            median = statistics.median(past)
            # Of neighbours' differences, so that a loss on its way down is no scatter.
            jumps = [abs(after - before) for before, after in itertools.pairwise(past)]
            spread = 1.4826 * statistics.median(jumps) / math.sqrt(2)
            limit = median + max(SPIKE_SPREAD * spread, SPIKE_SHARE * abs(median))
            if self._lasting.reaches("spike", loss > limit, 1):
                words = (
                    f"the loss jumped from {median:.4f} to {loss:.4f}; if it happens again lower "
                    "optimizer.learning_rate or train.max_grad_norm"
                )
                numbers = {"loss": loss, "median": median, "limit": limit}
                found.append(Finding("loss_spike", "warning", words, "optimizer.learning_rate", step, evidence=numbers))
        norm = record.grad_norm
        if self._lasting.reaches("gradient", norm > LARGE_NORM, LONG_PATIENCE):
            words = (
                f"the gradient's norm has been above {LARGE_NORM:g} for {LONG_PATIENCE} intervals, now {norm:.1f}; "
                "lower optimizer.learning_rate or lengthen the warm-up, and look at the data"
            )
            numbers = {"grad_norm": norm}
            found.append(Finding("gradient_norm", "warning", words, "optimizer.learning_rate", step, evidence=numbers))
        self._losses.append(loss)
        self._intervals += 1
        if len(self._first) < 3:
            # A run that goes on from a checkpoint may be near its end, where the loss hardly moves.
            self._from_the_start &= len(self._first) != 1 or 2 * self._first_step <= step
            self._first_step = self._first_step or step
            self._first.append(loss)
        if self._intervals < LONG_PATIENCE:
            return found
        recent = statistics.median(list(self._losses)[-LONG_PATIENCE:])
        diverged = self._lowest > 0 and recent > DIVERGED * self._lowest
        if self._lasting.reaches("diverged", diverged, PATIENCE):
            words = (
                f"the loss has risen from {self._lowest:.4f} to {recent:.4f} and stays there: training diverges; go "
                "back to a checkpoint with a lower optimizer.learning_rate, and set train.divergence_loss"
            )
            numbers = {"loss": recent, "lowest": self._lowest}
            found.append(Finding("divergence", "critical", words, "optimizer.learning_rate", step, evidence=numbers))
        self._lowest = min(self._lowest, recent)
        if self._intervals == FLAT_AFTER and self._from_the_start:
            start = statistics.median(self._first)
            if FLAT * start <= recent <= DIVERGED * start:
                words = (
                    f"the loss has hardly moved in {step} steps, {start:.4f} to {recent:.4f}; raise "
                    "optimizer.learning_rate (is the warm-up over?), and look at the data"
                )
                numbers = {"first": start, "loss": recent, "learning_rate": record.learning_rate}
                found.append(Finding("flat_loss", "warning", words, "optimizer.learning_rate", step, evidence=numbers))
        return found

    def _speed(self, record: TrainRecord) -> list[Finding]:
        found, step = [], record.step
        wait, talk = record.data_wait_share, record.all_to_all_share
        if self._pace.reaches("starved", wait > STARVED, PATIENCE):
            words = f"{wait:.0%} of the time went into waiting for data; raise data.dataloader_num_workers"
            numbers = {"data_wait_share": wait}
            found.append(
                Finding("data_starved", "warning", words, "data.dataloader_num_workers", step, evidence=numbers)
            )
        if self._pace.reaches("talkative", talk > TALKATIVE, LONG_PATIENCE):
            words = (
                f"{talk:.0%} of the time goes into all-to-all: lower parallel.ep_size, keep it inside a host, or raise "
                "train.per_device_train_batch_size"
            )
            numbers = {"all_to_all_share": talk, "all_to_all_bytes": float(record.all_to_all_bytes)}
            found.append(Finding("all_to_all_bound", "warning", words, "parallel.ep_size", step, evidence=numbers))
        slow = record.mfu is not None and record.mfu < LOW_MFU
        if self._pace.reaches("low mfu", slow, LONG_PATIENCE) and record.mfu is not None:
            phases = {
                key: record.phase_seconds.get(key, 0.0) for key in ("data", "computing", "all_to_all", "gradients")
            }
            largest = max(phases, key=lambda key: phases[key])
            words = (
                f"the devices do {record.mfu:.1%} of what they can, most of the time goes into "
                f"{PHASE_KEYS[largest]}; raise train.per_device_train_batch_size, use train.bf16"
            )
            numbers = {"mfu": record.mfu, **phases}
            key = "train.per_device_train_batch_size"
            found.append(Finding("low_mfu", "warning", words, key, step, evidence=numbers))
        return found

    def _straggling(self, record: TrainRecord) -> list[Finding]:
        new = [rank for rank in record.stragglers if rank not in self._stragglers]
        self._stragglers = set(record.stragglers)
        found = record.ranks
        return [straggler(rank, found, record.step, self.hosts, self.stages) for rank in new if found is not None]

    def evaluation(self, record: EvalRecord) -> list[Finding]:
        """An evaluation."""
        recent = list(self._losses)[-5:]
        self._evals.append((record.loss, statistics.median(recent) if recent else math.nan))
        best, training_then = min(self._evals)
        loss, training_now = self._evals[-1]
        if not self._lasting.reaches("overfitting", loss > OVERFITTED * best, 1):
            return []
        numbers = {"loss": loss, "best": best, "training_loss": training_now, "training_loss_then": training_then}
        remedy = "stop earlier (train.early_stopping_patience), or train on more data"
        kind, words = "validation_rising", f"validation loss rose from {best:.4f} to {loss:.4f}: {remedy}"
        if training_now < training_then:
            kind = "overfitting"
            words = (
                f"validation loss rose from {best:.4f} to {loss:.4f} while training loss fell from "
                f"{training_then:.4f} to {training_now:.4f}: overfitting; {remedy}"
            )
        return [Finding(kind, "warning", words, "train.early_stopping_patience", record.step, evidence=numbers)]

    def checkpoint(self, record: CheckpointRecord, moment: float) -> list[Finding]:
        """A checkpoint that ended at `moment`, seconds since 1970."""
        if not record.ok:
            words = f"a checkpoint could not be written: {record.reason}"
            return [Finding("checkpoint_failed", "critical", words, "checkpoint.on_failure", record.step)]
        before, self._saved_at = self._saved_at, moment
        if before is None:
            return []
        between = moment - before
        if between < record.blocked_seconds:  # clocks that do not fit together
            return []
        share = record.blocked_seconds / max(between, 1e-9)
        if not self._pace.reaches("slow checkpoint", share > BLOCKED, 2):
            return []
        words = (
            f"training waits for checkpoints {share:.0%} of the time ({record.blocked_seconds:.1f} s each); set "
            "checkpoint.background, raise checkpoint.save_steps, or write to a faster disk"
        )
        numbers = {"blocked_seconds": record.blocked_seconds, "seconds_between": between}
        return [Finding("slow_checkpoint", "warning", words, "checkpoint.background", record.step, evidence=numbers)]


def straggler(
    rank: int, ranks: RanksRecord, step: int | None, hosts: Sequence[str], stages: Sequence[int] = ()
) -> Finding:
    """A slow rank with its host, the phase in which it loses most, and whether its load explains it; the others are
    those of its pipeline stage, which do the same work.
    """
    everyone = range(len(ranks.own_seconds))
    alike = [one for one in everyone if one != rank and (not stages or stages[one] == stages[rank])]

    def others(values: Sequence[float]) -> float:
        return statistics.median(values[index] for index in alike)

    own, usual = ranks.own_seconds[rank], others(ranks.own_seconds)
    lost = {
        key: ranks.phase_seconds[key][rank] - others(ranks.phase_seconds[key])
        for key in ("data", "computing", "optimizer")
        if key in ranks.phase_seconds
    }
    phase = max(lost, key=lambda key: lost[key])
    host = f" on {hosts[rank]}" if rank < len(hosts) else ""
    rows = ranks.received_rows[rank] / max(1.0, others(ranks.received_rows))
    key, remedy = "", "look at that machine: other processes, clock, memory, disk"
    if phase == "data":
        key, remedy = "data.dataloader_num_workers", "its data is slow: raise data.dataloader_num_workers, or its disk"
    elif rows >= UNEQUAL_ROWS:
        key = "balance.bias_update_rate"
        remedy = f"it gets {rows:.1f} times the rows of the others: set balance.bias_update_rate (1e-3)"
    words = (
        f"rank {rank}{host} takes {own / max(usual, 1e-9):.1f} times as long as the others, most of it "
        f"{PHASE_KEYS[phase]} ({1000 * own:.0f} ms a step against {1000 * usual:.0f}); {remedy}"
    )
    numbers = {"own_seconds": own, "others": usual, "lost_seconds": lost[phase], "rows_ratio": rows}
    return Finding("straggler", "warning", words, key, step, rank=rank, evidence=numbers)
