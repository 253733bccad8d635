"""`metrics.jsonl`: one JSON object per line, the file other programs read."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from moe_dist.monitor.records import (
    ActionRecord,
    CheckpointRecord,
    EvalRecord,
    FailureRecord,
    Record,
    RunInfo,
    RunSummary,
    TrainRecord,
)
from moe_dist.monitor.sinks.base import Sink
from moe_dist.monitor.sinks.detail import Detail


def json_safe(value: Any) -> Any:
    """The value with the strings "NaN", "Infinity", "-Infinity" for the floats JSON has no numbers for.

    `float()` in Python and `Number()` in JavaScript read all three.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if set(map(type, value)) == {int}:  # counts of every expert: most of a record
            return value
        return [json_safe(item) for item in value]
    return value


class JsonlSink(Sink):
    """Appends each record with the wall-clock `time` (seconds since 1970), and flushes it."""

    name = "metrics.jsonl"

    def __init__(self, path: Path | str, detail_steps: int | None = None) -> None:
        """`detail_steps`: steps between two records of training with every expert and rank; default: see `Detail`."""
        self.path, self._detail = Path(path), Detail(detail_steps)
        self.folder = self.path.parent
        self._file: FileIO | None = None

    def open(self, info: RunInfo) -> None:
        self._write(info)

    def train(self, record: TrainRecord) -> None:
        self._write(self._detail.thinned(record))

    def evaluation(self, record: EvalRecord) -> None:
        self._write(record)

    def checkpoint(self, record: CheckpointRecord) -> None:
        self._write(record)

    def action(self, record: ActionRecord) -> None:
        self._write(record)

    def failure(self, record: FailureRecord) -> None:
        """Not from the run, which is gone: from what had started it."""
        self._write(record)

    def summary(self, summary: RunSummary) -> None:
        self._write(summary)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _write(self, record: Record) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self.path)
            # Bytes, and no buffer: what a full disk has refused is not kept, to come out in the middle of a later line.
            self._file = self.path.open("ab", buffering=0)
        row = json_safe(record.to_json() | {"time": round(time.time(), 3)})
        line = memoryview(json.dumps(row, allow_nan=False).encode() + b"\n")
        while line:  # a disk that is almost full takes a part
            line = line[self._file.write(line) :]


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last newline: a run that was killed while writing leaves half a record."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = start = file.seek(0, 2)
        tail = b""
        while start and b"\n" not in tail:
            start = max(0, start - 65536)
            file.seek(start)
            tail = file.read(end - start)
        keep = start + tail.rfind(b"\n") + 1
        if keep < end:
            file.truncate(keep)


def note_failure(folder: Path | str, reason: str) -> None:
    """Write into the log of a run whose ranks are gone how they ended; nothing when there is no log to write to."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return
    sink = JsonlSink(path)
    with suppress(OSError):  # a full disk may be why it failed
        sink.failure(FailureRecord(reason))
    with suppress(OSError):
        sink.close()
