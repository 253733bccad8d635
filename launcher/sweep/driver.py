"""A sweep by Ray Tune: a trial is a run of `moe-dist train` with as many CPUs or GPUs as it has ranks."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.backends.ray_driver import abandon, connect  # before Ray: it sets what Ray reads
from launcher.connect.exit_codes import EXIT_FAILED
from launcher.supervise.processes import Signals, say
from launcher.sweep.plan import TRIALS, Sweep, Trial, is_done, metric_of, state
from launcher.sweep.trial import run
from moe_dist.config import Config, ConfigError

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # of which not even verbose=0 is silent
import ray
from ray import tune

POLL = 0.5


def train(sweep: Sweep, address: str | None) -> int:
    """Train what has not been trained; returns the exit code."""
    todo = sweep.todo
    if len(todo) < len(sweep.trials):
        say(f"{len(sweep.trials) - len(todo)} of {len(sweep.trials)} trials are done already")
    if not todo:
        return 0
    for trial in todo:
        (sweep.folder / TRIALS / f"{trial.name}.json").unlink(missing_ok=True)
    notes = sweep.folder.absolute() / ".ray"
    connect(address, max(trial.resources["cpu"] for trial in todo))
    _check_room(todo)
    with Signals() as signals:  # after Ray, which takes SIGTERM to itself
        thread = threading.Thread(target=_fit, args=(sweep, todo, notes), daemon=True)
        thread.start()
        reported: set[str] = set()
        while thread.is_alive() and not signals.first:
            thread.join(POLL)
            _report(sweep, reported)
        shutil.rmtree(notes, ignore_errors=True)
        if signals.first:
            name = "Ctrl-C" if signals.first == signal.SIGINT else signal.Signals(signals.first).name
            say(f"stopped by {name}; the same command goes on with the trials that are left")
            abandon(128 + signals.first)
        ray.shutdown()
    return 0 if all(is_done(sweep.outcome(trial)) for trial in sweep.trials) else EXIT_FAILED


def _fit(sweep: Sweep, todo: list[Trial], notes: Path) -> None:
    jobs = {
        trial.name: {
            "config": trial.config.model_dump_json(),
            "digest": trial.digest,
            "log": str(sweep.folder.absolute() / f"{trial.name}.log"),
            "result": str(sweep.folder.absolute() / TRIALS / f"{trial.name}.json"),
            "folder": str(Path.cwd()),
        }
        for trial in todo
    }
    resources = {trial.name: trial.resources for trial in todo}
    tuner = tune.Tuner(
        tune.with_resources(_trial, lambda space: resources[space["trial"]]),
        param_space={"trial": tune.grid_search(list(jobs)), "jobs": jobs},
        tune_config=tune.TuneConfig(max_concurrent_trials=sweep.max_concurrent),
        run_config=tune.RunConfig(name="sweep", storage_path=str(notes), verbose=0),
    )
    with suppress(Exception):  # what became of a trial is in its file, or is missing there
        tuner.fit()


def _trial(space: dict[str, Any]) -> None:
    """What a worker of Ray does."""
    job = space["jobs"][space["trial"]]
    config = Config.model_validate_json(job["config"])
    run(config, job["digest"], Path(job["log"]), Path(job["result"]), tune.report, job["folder"])


def _check_room(todo: list[Trial]) -> None:
    """A trial is on one node. Raises ConfigError when none is large enough."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for trial in todo:
        for name, wanted in trial.resources.items():
            most = max((node.get(name.upper(), 0) for node in nodes), default=0)
            if most < wanted:
                raise ConfigError(
                    f"the trial {trial.name} needs {wanted:g} {name.upper()}s on one node, and the largest "
                    f"has {most:g}: lower launch.nproc_per_node"
                )


def _report(sweep: Sweep, reported: set[str]) -> None:
    """One line for each trial that has ended."""
    for trial in sweep.trials:
        outcome = sweep.outcome(trial)
        if outcome is None or trial.name in reported:
            continue
        reported.add(trial.name)
        value = metric_of(outcome, sweep.metric)
        what = f"{sweep.metric} {value:.4f}" if value is not None and is_done(outcome) else state(outcome)
        more = f": {outcome['error']}" if outcome["error"] else ""
        ended = sum(1 for other in sweep.trials if sweep.outcome(other) is not None)
        print(f"{ended}/{len(sweep.trials)}  {trial.name}  {what} in {outcome['seconds']:g} s{more}", flush=True)
