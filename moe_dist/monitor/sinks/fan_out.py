"""Every record to every sink, and no sink to the harm of training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from moe_dist.monitor.records import ActionRecord, CheckpointRecord, EvalRecord, RunInfo, RunSummary, TrainRecord
from moe_dist.monitor.sinks.base import Sink

logger = logging.getLogger(__name__)


class Sinks:
    """Hands each record to each sink. One that raises is named in a warning and dropped; training goes on."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)

    def open(self, info: RunInfo) -> None:
        self._each(lambda sink: sink.open(info))

    def train(self, record: TrainRecord) -> None:
        self._each(lambda sink: sink.train(record))

    def evaluation(self, record: EvalRecord) -> None:
        self._each(lambda sink: sink.evaluation(record))

    def checkpoint(self, record: CheckpointRecord) -> None:
        self._each(lambda sink: sink.checkpoint(record))

    def action(self, record: ActionRecord) -> None:
        self._each(lambda sink: sink.action(record))

    def summary(self, summary: RunSummary) -> None:
        self._each(lambda sink: sink.summary(summary))

    def message(self, text: str) -> None:
        self._each(lambda sink: sink.message(text))

    def close(self) -> None:
        """Close every sink; afterwards there is none."""
        self._each(lambda sink: sink.close())
        self.sinks = []

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                call(sink)
            except Exception as error:
                self.sinks.remove(sink)
                # First let go of the terminal or file, so that the warning can be read.
                with suppress(Exception):
                    sink.close()
                logger.warning(
                    "%s failed (%s: %s); training goes on without it",
                    *(sink.name, type(error).__name__, error),
                    exc_info=True,
                )
