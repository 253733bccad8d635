"""What a sink is."""

from __future__ import annotations

from pathlib import Path

from moe_dist.monitor.records import ActionRecord, CheckpointRecord, EvalRecord, RunInfo, RunSummary, TrainRecord


class Sink:
    """Takes records somewhere. Every verb does nothing here; a sink overrides those it has a use for.

    Constructors touch no file and start no thread: failing is for `open`, where `Sinks` catches it.
    """

    name = "sink"
    folder: Path | None = None
    """Where it writes; None when it writes no files."""

    def open(self, info: RunInfo) -> None:
        """Before the first step."""

    def train(self, record: TrainRecord) -> None:
        """Once per logging interval."""

    def evaluation(self, record: EvalRecord) -> None:
        """After each evaluation."""

    def checkpoint(self, record: CheckpointRecord) -> None:
        """After each checkpoint, also one that failed."""

    def action(self, record: ActionRecord) -> None:
        """After each automatic change of a layer's balancing."""

    def summary(self, summary: RunSummary) -> None:
        """Once, at the end."""

    def message(self, text: str) -> None:
        """A sentence for the reader now."""

    def close(self) -> None:
        """Release everything; may be called twice, and after an error."""
