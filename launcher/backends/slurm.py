"""`moe-dist launch slurm`: what is handed to sbatch, to the word, and the handing over. Imports no torch."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.backends.command import Start, chosen, for_world
from launcher.backends.shipped import SHIPPED
from moe_dist.config import Config, ConfigError

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_SPARE = 20
"""Seconds between the end of the ranks' grace and that of the job."""


@dataclass(frozen=True)
class Request:
    """What a person asks Slurm for. None: what the script or the cluster says."""

    nodes: int = 1
    ntasks_per_node: int = 1
    """Ranks on each node."""
    cpus_per_task: int | None = None
    """CPUs of each rank."""
    gpus_per_node: str | None = None
    mem: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    job_name: str | None = None
    array: str | None = None
    """Seeds: a job for each."""
    srun: bool = False
    """Ranks are tasks of srun; else torchrun starts them."""
    options: tuple[str, ...] = ()
    """More words for sbatch, as they are."""


@dataclass(frozen=True)
class Job(Start):
    """What is given to sbatch."""

    script: Path
    output: str
    """Where the job prints to, with %j for its number."""


def plan(
    path: str,
    overrides: Sequence[str],
    config: Config,
    request: Request,
    notice: Callable[[str], None] = lambda text: None,
) -> Job:
    """What `moe-dist launch slurm` submits. Raises ConfigError when it could not work."""
    script = _script("array.sbatch" if request.array else "train_srun.sbatch" if request.srun else "train.sbatch")
    for option, value, form, example in (
        ("--time", request.time, _TIME, "minutes, 01:30:00 or 2-00"),
        ("--array", request.array, _ARRAY, "seeds as in 1-5, 1,3,7 or 1-20%4"),
    ):
        if value is not None and not form.fullmatch(value):
            raise ConfigError(f"{option} {value}: allowed: {example}")
    if request.array and request.nodes > 1:
        raise ConfigError(f"--nodes {request.nodes}: every seed of --array trains on one node")
    if request.array and request.srun:
        raise ConfigError("--srun: the seeds of --array start their own ranks, without srun")
    ranks = request.ntasks_per_node
    config = for_world(config, request.nodes * ranks, notice, per_host=ranks, elsewhere=True)
    overrides = [*overrides, *chosen(config)]
    grace = math.ceil(config.launch.grace_period)
    name = request.job_name or "moe-dist"
    output = f"{name}-%A-%a.out" if request.array else f"{name}-%j.out"
    asked: list[tuple[str, object]] = [
        ("job-name", request.job_name),
        ("nodes", request.nodes),
        ("ntasks-per-node", 1 if request.array else request.ntasks_per_node),
        ("cpus-per-task", _cpus(request)),
        ("gpus-per-node", request.gpus_per_node),
        ("mem", request.mem),
        ("time", request.time),
        ("partition", request.partition),
        ("account", request.account),
        ("qos", request.qos),
        ("array", request.array),
        ("signal", f"B:USR1@{grace + _SPARE}"),
    ]
    options = [f"--{option}={value}" for option, value in asked if value is not None]
    arguments = list(overrides)
    if request.array:
        arguments = [str(config.train.output_dir), *overrides, f"launch.nproc_per_node={request.ntasks_per_node}"]
    return Job(
        {"MOE_DIST_PYTHON": sys.executable, "MOE_DIST_GRACE": str(grace)},
        ("sbatch", *options, *request.options, str(script), path, *arguments),
        script,
        output,
    )


def submit(job: Job) -> str:
    """Hand it to sbatch; returns the job's number. Raises ConfigError with what sbatch said."""
    program = shutil.which(job.command[0])
    if program is None:
        raise ConfigError("sbatch is not on this machine: submit where Slurm is; --dry-run shows what it would be")
    words = [program, "--parsable", *job.command[1:]]
    done = subprocess.run(words, env={**os.environ, **job.variables}, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
        raise ConfigError(f"sbatch refused: {said or f'exit code {done.returncode}'}")
    sys.stderr.write(done.stderr)
    # With several clusters: number;cluster.
    return done.stdout.strip().partition(";")[0]


def followed(job: Job, number: str) -> str:
    """How to see what becomes of it, and how to end it."""
    output = job.output.replace("%j", number).replace("%A", number).replace("%a", "*")
    return "\n".join(
        [
            f"job {number} is submitted",
            f"  its output      tail -F {output}",
            f"  its state       squeue --jobs={number}",
            f"  save, go later  scancel --batch --signal=USR1 {number}",
            f"  end it          scancel {number}",
        ]
    )


def _cpus(request: Request) -> int | None:
    if request.cpus_per_task is None or not request.array:
        return request.cpus_per_task
    return request.cpus_per_task * request.ntasks_per_node  # one task starts them all


def _script(name: str) -> Path:
    """The batch script, by its shortest path from here."""
    path = (SHIPPED / "slurm" / name).resolve()
    near = os.path.relpath(path)
    return path if near.startswith("..") else Path(near)
