"""A run folder read back: what `metrics.jsonl` says about a run, as it would be without its restarts."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.config_loading import ConfigError
from moe_dist.monitor.records import FailureRecord, LayerRecord, known

Row = dict[str, Any]
_NUMBERS = {"NaN", "Infinity", "-Infinity"}


@dataclass
class RunLog:
    """One run: rows of `metrics.jsonl` by kind, in the order of steps; not-finite numbers are floats again."""

    name: str
    folder: Path
    starts: list[Row] = field(default_factory=list)
    """A row for each start; the last says what runs now. `step`: the first step logged after it, None before one."""
    train: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    """Rows of every kind that count, in the order of time."""
    actions: list[Row] = field(default_factory=list)
    """Automatic changes of balancing."""
    checkpoints: list[Row] = field(default_factory=list)
    """In the order of time, of all starts."""
    summary: Row | None = None
    """Of the last start; None while it runs, and after it was killed."""

    def layers(self, row: Row) -> list[LayerRecord]:
        """The expert layers of a row; fields that a newer or older version wrote are left out or unknown."""
        return [known(LayerRecord, layer) for layer in row["layers"]]


def read_run(folder: Path | str) -> RunLog:
    """Read `metrics.jsonl` of a run folder.

    After a restart the steps it repeats count once, as they went the last time. An unfinished last line of a run
    that still writes, or was killed, is left out. Raises ConfigError when there is no log or nothing in it.
    """
    path = Path(folder) / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{folder}: no run folder, {path.name} cannot be read ({error.strerror})") from None
    run = RunLog(Path(folder).resolve().name, Path(folder))
    for number, line in enumerate(lines, 1):
        try:
            row = _floats(json.loads(line))
            _add(run, row)
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ConfigError(f"{path}:{number}: not a line of metrics ({error})") from None
    if not run.train:
        raise ConfigError(f"{path}: no step has been logged yet")
    return run


def note_failure(folder: Path | str, reason: str) -> None:
    """Write into the log of a run whose ranks are gone how they ended; nothing when there is no log to write to."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return
    from moe_dist.monitor.sinks.jsonl import JsonlSink  # numpy and more, for the few runs that fail

    sink = JsonlSink(path)
    with suppress(OSError):  # a full disk may be why it failed
        sink.failure(FailureRecord(reason))
    with suppress(OSError):
        sink.close()


def _add(run: RunLog, row: Row) -> None:
    kind = row["kind"]
    if kind == "train" and run.starts and run.starts[-1]["step"] is None:
        repeated = ("train", "eval", "action")
        run.rows = [old for old in run.rows if old["kind"] not in repeated or old["step"] < row["step"]]
    run.rows.append(row)
    if kind == "run":
        run.starts.append(row | {"step": None})
        run.summary = None
    elif kind == "train":
        if run.starts and run.starts[-1]["step"] is None:
            run.starts[-1]["step"] = row["step"]
            run.train = [old for old in run.train if old["step"] < row["step"]]
            run.evals = [old for old in run.evals if old["step"] < row["step"]]
            run.actions = [old for old in run.actions if old["step"] < row["step"]]
        run.train.append(row)
    elif kind == "eval":
        run.evals = [old for old in run.evals if old["step"] < row["step"]] + [row]
    elif kind == "action":
        run.actions.append(row)
    elif kind == "checkpoint":
        run.checkpoints.append(row)
    elif kind == "summary":
        run.summary = row


def _floats(value: Any) -> Any:
    """The value with floats for the strings "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, str) and value in _NUMBERS:
        return float(value)
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return value
