"""A run folder read back: what `metrics.jsonl` says about a run, as it would be without its restarts.

Memory is bounded whatever the length of the run: rows are read as a stream, and of each kind so many are kept that a
figure can show, always with the extremes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.config import ConfigError
from moe_dist.monitor.metric import known, metrics_of
from moe_dist.monitor.records import LayerRecord

Row = dict[str, Any]
MOST_ROWS = 2000
"""Rows of a kind that are kept, at most twice as many."""
MOST_DETAILS = 100
"""Rows that are kept with every expert and every rank, at most twice as many."""
NEWEST = 20
"""The last rows, which are kept as they are."""
SERIES = {metric.name: metric for metric in metrics_of(LayerRecord).values() if metric.chart}
"""Fields of a layer that have a curve, and are kept of more rows than those with detail."""
_NUMBERS = {"NaN", "Infinity", "-Infinity"}
_HEAD = re.compile(rb'^\{"kind": "(\w+)"(?:, "step": (\d+),)?')
_REPEATED = ("train", "eval", "action")


@dataclass
class RunLog:
    """One run: rows of `metrics.jsonl` by kind, in the order of steps; not-finite numbers are floats again."""

    name: str
    folder: Path
    starts: list[Row] = field(default_factory=list)
    """A row for each start; the last says what runs now. `step`: the first step logged after it, None before one."""
    train: list[Row] = field(default_factory=list)
    """Of a long run some, the extremes among them; `layers` and `ranks` are empty where they are not kept."""
    layer_rows: list[Row] = field(default_factory=list)
    """`step` and, for each of SERIES, a list over layers; of more rows than those of `train` with `layers`."""
    evals: list[Row] = field(default_factory=list)
    endings: list[Row] = field(default_factory=list)
    """Rows that say how a start began or ended, in the order of time."""
    actions: list[Row] = field(default_factory=list)
    """Automatic changes of balancing."""
    checkpoints: list[Row] = field(default_factory=list)
    """In the order of time, of all starts."""
    summary: Row | None = None
    """Of the last start; None while it runs, and after it was killed."""
    last: Row = field(default_factory=dict)
    """The last row of any kind."""
    num_checkpoints: int = 0
    """Complete ones."""
    training_seconds: float = 0.0
    """Tokens / tokens per second, of all logged steps."""
    _size: int = 0
    _voids: list[tuple[int, int]] = field(default_factory=list)

    def layers(self, row: Row) -> list[LayerRecord]:
        """The expert layers of a row; fields that a newer or older version wrote are left out or unknown."""
        return [known(LayerRecord, layer) for layer in row["layers"]]

    @property
    def rows(self) -> Iterator[Row]:
        """Rows of every kind that count, in the order of time, all of them, read anew."""
        for _, row in _parsed(self.folder / "metrics.jsonl", self._size, self._voids):
            yield row


def read_run(folder: Path | str) -> RunLog:
    """Read `metrics.jsonl` of a run folder.

    After a restart the steps it repeats count once, as they went the last time. An unfinished last line of a run
    that still writes, or was killed, is left out. Raises ConfigError when there is no log or nothing in it.
    """
    path = Path(folder) / "metrics.jsonl"
    run = RunLog(Path(folder).resolve().name, Path(folder))
    try:
        run._size = path.stat().st_size
        run._voids = _repeated(path, run._size)
    except OSError as error:
        raise ConfigError(f"{folder}: no run folder, {path.name} cannot be read ({error.strerror})") from None
    before = 0
    for number, row in _parsed(path, run._size, run._voids):
        try:
            tokens = row["tokens"] if row["kind"] == "train" else before
            if tokens != before and row["tokens_per_second"]:
                run.training_seconds += (tokens - before) / row["tokens_per_second"]
            before = tokens
            _add(run, row)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: not a line of metrics ({error})") from None
    if not run.train:
        raise ConfigError(f"{path}: no step has been logged yet")
    return run


def _lines(path: Path, size: int) -> Iterator[bytes]:
    """The lines in the first `size` bytes."""
    with path.open("rb") as file:
        for line in file:
            size -= len(line)
            yield line
            if size <= 0:
                return


def _repeated(path: Path, size: int) -> list[tuple[int, int]]:
    """For every start of the run, the line of its first step and that step: what stands above it and is not below that
    step was done again.
    """
    found, started = [], False
    for number, line in enumerate(_lines(path, size), 1):
        head = _HEAD.match(line)
        kind = head.group(1) if head else b""
        if kind == b"run":
            started = True
        elif (started and kind == b"train") or not kind:  # few: the rest is not parsed here
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                if row["kind"] == "train" and started:
                    found.append((number, int(row["step"])))
                    started = False
                started |= row["kind"] == "run"
    lowest = math.inf
    for index in range(len(found) - 1, -1, -1):  # a later start may have gone back further
        lowest = min(lowest, found[index][1])
        found[index] = (found[index][0], int(lowest))
    return found


def _parsed(path: Path, size: int, voids: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Row]]:
    """Number and row of the lines that count. Raises ConfigError for one that is none, unless it is the last."""
    rest, broken = iter(voids), None
    first, step = next(rest, (0, 0))
    for number, line in enumerate(_lines(path, size), 1):
        if broken is not None:
            raise broken
        while first and number >= first:
            first, step = next(rest, (0, 0))
        head = _HEAD.match(line)
        if first and head and head.group(2) and head.group(1).decode() in _REPEATED and int(head.group(2)) >= step:
            continue
        try:
            row = json.loads(line)
            if b'"NaN"' in line or b'Infinity"' in line:
                row = _floats(row)
            if first and row["kind"] in _REPEATED and row["step"] >= step:
                continue
        except (ValueError, KeyError, TypeError) as error:
            broken = ConfigError(f"{path}:{number}: not a line of metrics ({error})")
            continue
        yield number, row


def _add(run: RunLog, row: Row) -> None:
    kind = row["kind"]
    run.last = {"kind": kind, "time": row.get("time")}
    if kind in ("run", "failure", "summary"):
        run.endings.append(row)
    if kind == "run":
        run.starts.append(row | {"step": None})
        run.summary = None
    elif kind == "train":
        if run.starts and run.starts[-1]["step"] is None:
            run.starts[-1]["step"] = row["step"]
        row.pop("steps", None)
        run.train.append(row)
        if row["layers"]:
            series = {key: [layer.get(key, 0.0) for layer in row["layers"]] for key in SERIES}
            numbers = [layer["layer"] for layer in row["layers"]]
            run.layer_rows.append({"step": row["step"], "layers": numbers} | series)
            _thin(run.layer_rows, (_largest("load_imbalance", max), _largest("load_entropy", min, -1.0)))
        _forget_detail(run.train)
        _thin(run.train, (_high("loss"), _low("loss"), _high("grad_norm"), _low("tokens_per_second")))
    elif kind == "eval":
        while run.evals and run.evals[-1]["step"] >= row["step"]:
            run.evals.pop()
        run.evals.append(row)
        _thin(run.evals, (_high("loss"), _low("loss")))
    elif kind == "action":
        run.actions.append(row)
        _thin(run.actions, (_high("step"),))
    elif kind == "checkpoint":
        run.checkpoints.append(row)
        run.num_checkpoints += row["ok"]
        _thin(run.checkpoints, (_high("seconds"), lambda one: not one["ok"]))
    elif kind == "summary":
        run.summary = row


def _thin(rows: list[Row], extremes: Sequence[Callable[[Row], float]]) -> None:
    """When there are too many, keep half of the older ones: of every few the ones that are extreme."""
    if len(rows) <= 2 * MOST_ROWS:
        return
    old, new = rows[:-NEWEST], rows[-NEWEST:]
    group = 2 * len(extremes)
    kept: list[Row] = old[:1]
    for start in range(1, len(old), group):
        several = old[start : start + group]
        best = {max(range(len(several)), key=lambda index: extreme(several[index])) for extreme in extremes}
        kept += [one for index, one in enumerate(several) if index in best or one.get("ranks")]
    rows[:] = kept + new


def _forget_detail(rows: list[Row]) -> None:
    """When too many rows have it, keep the detail of every other older one: of two neighbours the more unbalanced."""
    if not (rows[-1]["layers"] or rows[-1].get("ranks")):
        return
    detailed = [row for row in rows if row["layers"] or row.get("ranks")] if len(rows) > 2 * MOST_DETAILS else []
    if len(detailed) <= 2 * MOST_DETAILS:
        return
    for one, other in zip(detailed[1:-NEWEST:2], detailed[2:-NEWEST:2], strict=False):
        less = min(one, other, key=lambda row: max((layer["load_imbalance"] for layer in row["layers"]), default=0.0))
        less.update(layers=[], ranks=None)


def _high(key: str) -> Callable[[Row], float]:
    return lambda row: -math.inf if math.isnan(row[key]) else row[key]


def _low(key: str) -> Callable[[Row], float]:
    """The lowest; NaN is lower than everything, so that one of several is kept."""
    return lambda row: math.inf if math.isnan(row[key]) else -row[key]


def _largest(key: str, of: Callable[[list[float]], float], sign: float = 1.0) -> Callable[[Row], float]:
    return lambda row: sign * of(row[key])


def _floats(value: Any) -> Any:
    """The value with floats for the strings "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, str) and value in _NUMBERS:
        return float(value)
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return value
