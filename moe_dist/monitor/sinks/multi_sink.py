"""Every record to every sink, and no sink to the harm of training."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moe_dist.monitor.records import ActionRecord, CheckpointRecord, EvalRecord, RunInfo, RunSummary, TrainRecord
from moe_dist.monitor.sinks.base import Sink

logger = logging.getLogger(__name__)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a disk that takes nothing now and may again: somebody makes room, or mounts it for writing."""


@dataclass
class _Waiting:
    """A sink without room: how many records it has missed, and with what it must still be opened."""

    missed: int
    info: RunInfo | None


class Sinks:
    """Hands each record to each sink. One that raises is named in a warning and dropped; training goes on.

    One whose disk is full is kept, and goes on when there is room; what it has missed meanwhile is counted.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)
        self._waiting: dict[Sink, _Waiting] = {}

    def open(self, info: RunInfo) -> None:
        self._each(lambda sink: sink.open(info), info)

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
        self._waiting = {}
        self._each(lambda sink: sink.close())
        self.sinks = []

    def _each(self, call: Callable[[Sink], None], info: RunInfo | None = None) -> None:
        for sink in list(self.sinks):
            waiting = self._waiting.get(sink)
            if waiting is not None and not has_room(sink.folder):
                waiting.missed += 1
                continue
            try:
                if waiting is not None and waiting.info is not None:
                    sink.open(waiting.info)
                call(sink)
            except Exception as error:
                self._failed(sink, error, info)
                continue
            if self._waiting.pop(sink, None) is not None and waiting is not None:
                logger.warning("%s is written again; %d records are missing", sink.name, waiting.missed)

    def _failed(self, sink: Sink, error: Exception, info: RunInfo | None) -> None:
        # First let go of the terminal or file, so that the warning can be read.
        with suppress(Exception):
            sink.close()
        if isinstance(error, OSError) and error.errno in NO_ROOM and sink.folder is not None:
            if sink in self._waiting:
                self._waiting[sink].missed += 1
            else:
                self._waiting[sink] = _Waiting(1, info)
                logger.warning("%s: %s; training goes on, and so does it when there is room", sink.name, error.strerror)
            return
        self.sinks.remove(sink)
        logger.warning(
            "%s failed (%s: %s); training goes on without it",
            *(sink.name, type(error).__name__, error),
            exc_info=True,
        )


def has_room(folder: Path | None) -> bool:
    """Whether a small file can be written there now: of full, read-only and over quota no other test is sure."""
    if folder is None:
        return True
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    probe = there / f".room-{os.getpid()}"
    try:
        probe.write_bytes(bytes(16384))
    except OSError:
        return False
    finally:
        with suppress(OSError):
            probe.unlink()
    return True
