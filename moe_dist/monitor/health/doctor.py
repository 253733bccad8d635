"""`moe-dist doctor`: what a run folder says is wrong, from `metrics.jsonl` alone. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moe_dist.monitor.health.diagnosis import Diagnosis
from moe_dist.monitor.health.rules import Finding
from moe_dist.monitor.records import ActionRecord, CheckpointRecord, EvalRecord, RunInfo, TrainRecord
from moe_dist.monitor.run_log import Row, RunLog

SILENCE = 300.0
"""Seconds without a line, and ten logging intervals more, after which a run that has not ended counts as dead."""


def findings(run: RunLog, now: float | None = None) -> list[Finding]:
    """What a person should look at, in the order of the run; `info` is no reason to worry: what is over is history.

    `now`: seconds since 1970, to tell a run that goes on from one that was killed; default: the clock's.
    """
    events: list[Finding] = []
    diagnosis = Diagnosis()
    num_starts = 0
    for row in run.rows:
        kind = row["kind"]
        if kind == "run":
            num_starts += 1
            diagnosis.resumed(start_of(row))
        elif kind == "train":
            diagnosis.train(TrainRecord.of(row))
        elif kind == "eval":
            diagnosis.evaluation(EvalRecord.of(row))
        elif kind == "checkpoint":
            diagnosis.checkpoint(CheckpointRecord.of(row), row.get("time", 0.0))
        elif kind == "failure":
            went_on = num_starts < len(run.starts)
            words = f"the run {'had' if went_on else 'has'} failed: {row['reason']}"
            events.append(Finding("run_failed", "info" if went_on else "critical", words))
        elif kind == "action":
            done = ActionRecord.of(row)
            numbers = {"before": done.before, "now": done.now}
            events.append(Finding("action", "info", done.words, done.key, done.step, done.layer, evidence=numbers))
    for start in run.starts[1:]:
        if start["step"] is not None:
            events.append(Finding("restart", "info", f"started again before step {start['step']}"))
    at_the_end = _at_the_end(run, time.time() if now is None else now)
    return [*diagnosis.present, *history(diagnosis.past), *events, *at_the_end]


def history(past: Sequence[Finding]) -> list[Finding]:
    """What is over, a line for each kind."""
    by_kind: dict[str, list[Finding]] = {}
    for finding in past:
        by_kind.setdefault(finding.kind, []).append(finding)
    return [_as_one(found) for found in by_kind.values()]


def _as_one(found: Sequence[Finding]) -> Finding:
    first, until = found[0], max((one.until or 0 for one in found), default=0)
    layers = sorted({one.layer for one in found if one.layer is not None})
    words = f"{first.words}; over since step {until}"
    if len(found) == 1:
        return replace(first, words=words)
    where = f", layers {', '.join(map(str, layers[:12]))}{' and more' if len(layers) > 12 else ''}" if layers else ""
    words = f"{first.words}; {len(found)} times in all{where}, over since step {until}"
    return replace(first, words=words, layer=layers[0] if len(layers) == 1 else None, experts=(), until=until)


def start_of(row: Row) -> RunInfo:
    """The start of a run from its row; what an older version did not write is empty."""
    blank: dict[str, Any] = {
        "sentence": "", "layout": [], "config_text": "", "output_dir": "", "world_size": 0, "device": "",
        "trainable_params": 0, "total_params": 0, "active_params": 0,
    }  # fmt: skip
    return RunInfo.of(blank | row)


def _at_the_end(run: RunLog, now: float) -> list[Finding]:
    found = []
    best = min((row["loss"] for row in run.evals), default=None)
    unigram = run.evals[-1].get("unigram_loss") if run.evals else None
    if best is not None and unigram is not None and not best < unigram:
        words = (
            f"the best validation loss {best:.4f} is not below the unigram baseline {unigram:.4f}: nothing was "
            "learned from context yet"
        )
        numbers = {"best": best, "unigram_loss": unigram}
        found.append(Finding("nothing_learned", "info", words, "train.max_steps", evidence=numbers))
    last = run.train[-1]
    if run.summary is None and run.last["kind"] != "failure":
        words = f"no end was logged: the run still runs, or was killed after step {last['step']}"
        pace = (last["time"] - run.train[-2]["time"]) if len(run.train) > 1 and "time" in last else 0.0
        silent = now - (run.last["time"] or now)
        dead = silent > SILENCE + 10 * pace
        if dead:
            words += (
                f" (nothing written for {silent / 60:.0f} minutes); start it again to go on from its last checkpoint"
            )
        numbers = {"silent_seconds": silent}
        found.append(Finding("no_end", "warning" if dead else "info", words, evidence=numbers))
    elif run.summary is not None and run.summary.get("failed"):
        words = f"the run stopped itself: {run.summary['reason']}"
        found.append(Finding("stopped_itself", "critical", words))
    return found
