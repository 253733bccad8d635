"""When a run saves, and what a save that has ended means for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from moe_dist.checkpoint.manager import Outcome
from moe_dist.config import CheckpointConfig
from moe_dist.monitor.records import CheckpointRecord
from moe_dist.parallel.status import Status
from moe_dist.train.callbacks import Callback, RunState
from moe_dist.train.checkpointing import Persistence
from moe_dist.train.counters import Counters
from moe_dist.train.stopping import Stopping


class Saving(Callback):
    """Checkpoints every `checkpoint.save_steps` and at the end; every rank calls its methods at the same step."""

    def __init__(
        self,
        config: CheckpointConfig,
        persistence: Persistence,
        counters: Counters,
        stopping: Stopping,
        status: Status,
        *,
        metrics: Callable[[int], dict[str, float]],
        paused: Callable[[], AbstractContextManager[None]],
        announce: Callable[[CheckpointRecord], None],
    ) -> None:
        """`metrics`: what is known of the weights after a step. What goes on inside `paused` is no training time.
        `announce` tells all callbacks.
        """
        self.config, self.persistence, self.counters, self.stopping = config, persistence, counters, stopping
        self.status, self._metrics, self._paused, self._announce = status, metrics, paused, announce
        self.path: str | None = None
        """The last checkpoint that is complete."""

    def on_step_end(self, run: RunState) -> None:
        """Save when it is time."""
        if self.persistence.is_due(run.step):
            self.save()

    def save(self) -> None:
        """Begin to save this step, and wait for it unless that goes on in the background (collective)."""
        self.status.at("saving")
        with self._paused():
            before = self.persistence.save(self.counters, self._metrics(self.counters.step))
            if before is not None:
                self._ended(before)
            if not self.config.background:
                self.settle()

    def settle(self) -> Outcome | None:
        """Wait for the save in flight, if there is one (collective)."""
        if not self.persistence.checkpoints.in_flight:
            return None
        outcome = self.persistence.settle()
        self._ended(outcome)
        return outcome

    def finish(self, asked_to_stop: bool) -> None:
        """The end of a run that saves: what is in flight, and this step. Both must succeed."""
        self.settle()
        at_end = self.config.save_at_end or (asked_to_stop and self.persistence.is_on)
        if at_end and not self.stopping.failed and self.persistence.saved_step != self.counters.step:
            self.save()
        outcome = self.settle()
        if outcome is not None and outcome.error is not None:
            self.stopping.fail(f"the last checkpoint could not be written: {outcome.error}")
        self.stop_when_lost()

    def stop_when_lost(self) -> None:
        """Without its run folder, or with another run in it, a run trains for nothing (collective)."""
        reason = self.persistence.lost()
        if reason is not None:
            self.stopping.fail(reason)

    def _ended(self, outcome: Outcome) -> None:
        """A save has ended, well or not."""
        ok = outcome.error is None
        self._announce(
            CheckpointRecord(
                step=outcome.step,
                seconds=outcome.seconds,
                blocked_seconds=outcome.blocked_seconds,
                bytes=outcome.num_bytes if ok else 0,
                path=outcome.path,
                ok=ok,
                reason=outcome.error or "",
            )
        )
        if ok:
            self.path = outcome.path
            return
        self.counters.saves_failed += 1
        self.stop_when_lost()
        if self.config.on_failure == "stop":
            self.stopping.stop(f"checkpoint of step {outcome.step} failed: {outcome.error}", failed=True)
