"""`moe-dist doctor`: what a run folder says is wrong, from `metrics.jsonl` alone. Imports no torch."""

from __future__ import annotations

import time

from moe_dist.monitor.diagnosis import Diagnosis
from moe_dist.monitor.health import Finding
from moe_dist.monitor.records import ActionRecord, CheckpointRecord, EvalRecord, TrainRecord
from moe_dist.monitor.run_log import RunLog

SILENCE = 300.0
"""Seconds without a line, and ten logging intervals more, after which a run that has not ended counts as dead."""


def findings(run: RunLog, now: float | None = None) -> list[Finding]:
    """What a person should look at, in the order of the run; `info` is no reason to worry.

    `now`: seconds since 1970, to tell a run that goes on from one that was killed; default: the clock's.
    """
    found: list[Finding] = []
    diagnosis = Diagnosis()
    last_start = max((number for number, row in enumerate(run.rows) if row["kind"] == "run"), default=-1)
    for number, row in enumerate(run.rows):
        kind = row["kind"]
        if kind == "run":
            diagnosis.resumed(row.get("hosts", []), row.get("stage_of_rank", []))
        elif kind == "train":
            found += diagnosis.train(TrainRecord.of(row))
        elif kind == "eval":
            found += diagnosis.evaluation(EvalRecord.of(row))
        elif kind == "checkpoint":
            found += diagnosis.checkpoint(CheckpointRecord.of(row), row.get("time", 0.0))
        elif kind == "failure":
            went_on = number < last_start
            words = f"the run {'had' if went_on else 'has'} failed: {row['reason']}"
            found.append(Finding("run_failed", "info" if went_on else "critical", words))
        elif kind == "action":
            done = ActionRecord.of(row)
            numbers = {"before": done.before, "now": done.now}
            found.append(Finding("action", "info", done.words, done.key, done.step, done.layer, evidence=numbers))
    for start in run.starts[1:]:
        if start["step"] is not None:
            found.append(Finding("restart", "info", f"started again before step {start['step']}"))
    found += _at_the_end(run, time.time() if now is None else now)
    return found


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
    if run.summary is None and run.rows[-1]["kind"] != "failure":
        words = f"no end was logged: the run still runs, or was killed after step {last['step']}"
        pace = (last["time"] - run.train[-2]["time"]) if len(run.train) > 1 and "time" in last else 0.0
        silent = now - run.rows[-1].get("time", now)
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
