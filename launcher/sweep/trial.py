"""One trial of a sweep: `moe-dist train` as a process, ended with the worker of Ray that has started it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.backends.local import launch
from launcher.backends.ray_rank import last_step
from launcher.connect.rank_job import CONFIG, LAUNCHER
from launcher.rank.worker import die_with_parent
from launcher.sweep.plan import write_whole
from moe_dist.config import Config

POLL = 0.5


def run(
    config: Config, digest: str, log: Path, result: Path, report: Callable[[dict[str, Any]], None], folder: str
) -> None:
    """Train, tell `report` of steps and losses on the way, write how it ended to `result`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    run_folder = Path(folder) / config.train.output_dir  # Ray's worker has a folder of its own
    environment = {
        **os.environ,
        CONFIG: config.model_dump_json(),
        LAUNCHER: str(os.getpid()),
        # Ray would give every rank the cores of all.
        "OMP_NUM_THREADS": str(config.launch.num_threads or 1),
    }
    began, reported = time.monotonic(), -1
    with log.open("ab") as console:
        words = [sys.executable, "-u", "-m", "moe_dist", "trial"]
        process = subprocess.Popen(words, env=environment, cwd=folder, stdout=console, stderr=console)
        try:
            while process.poll() is None:
                time.sleep(POLL)
                at = last_step(run_folder)
                if at and at["step"] != reported:
                    reported = at["step"]
                    report(at)
        finally:
            process.kill()
            process.wait()
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    metrics = {} if code == 2 else last_rows(run_folder)
    seconds = round(time.monotonic() - began, 1)
    error = None if code == 0 else _last_error(log)
    write_whole(result, {"digest": digest, "code": code, "seconds": seconds, "error": error, "metrics": metrics})


def last_rows(run_folder: Path) -> dict[str, dict[str, float]]:
    """The numbers of the last line about training and evaluation in metrics.jsonl."""
    found: dict[str, dict[str, float]] = {}
    with suppress(OSError):
        for line in (run_folder / "metrics.jsonl").read_text("utf-8").splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if row.get("kind") in ("train", "eval"):
                    found[row["kind"]] = {
                        name: value
                        for name, value in row.items()
                        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
                    }
    return found


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.startswith("moe-dist: ")]
    return lines[-1].removeprefix("moe-dist: ").removeprefix("error: ") if lines else f"see {log}"


def run_trial() -> int:
    """The process of one trial; returns its exit code."""
    die_with_parent(int(os.environ.pop(LAUNCHER)))
    return launch(Config.model_validate_json(os.environ.pop(CONFIG)))
