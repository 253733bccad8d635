"""Who am I? Rank and world size, from the variables a starter leaves behind. Imports no torch."""

from __future__ import annotations

import itertools
import os
import re
import secrets
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from moe_dist.checkpoint.lock import Job
from moe_dist.config import ConfigError

JOB = "MOE_DIST_JOB"
"""A name that all starts of one job have, and no other job: a launcher that starts ranks again gives it, or whoever
else does (the manifests of k8s/)."""
SLURM = "MOE_DIST_SLURM"
"""1: a task of srun is a rank even when it is the only one. 0: leave Slurm's variables alone."""
BATCH = "MOE_DIST_GLOBAL_BATCH"
_SPECIAL_STEPS = 0xFFFFFFF0  # the batch script, the shell of salloc: steps that nobody started with srun
STORE, TOKEN = "MOE_DIST_STORE", "MOE_DIST_TOKEN"
"""How ranks meet: the socket on which rank 0 serves ("" for the others), and a word that keeps strangers out."""
_OF_RANKS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)$|MASTER_(ADDR|PORT)$|"
    r"(MOE_DIST|TORCHELASTIC|PET|SLURM|PMI|PMIX|OMPI|HYDRA|MPI)_"
)
_PORTS = range(10000, 30000)  # below those that Linux hands out by itself


@dataclass(frozen=True)
class Environment:
    """This process among all processes of the run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1


def started_by_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ranks have been started already: by torchrun, by this launcher, or by hand in its manner.

    Half of it counts: someone has tried, and starting ranks inside a rank would only hide it.
    """
    return "RANK" in environ or ("WORLD_SIZE" in environ and "MASTER_ADDR" in environ)


def outside_of_ranks(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What is left for a program that is none of these ranks, though one of them starts it."""
    return {name: value for name, value in environ.items() if name == "MOE_DIST_DEBUG" or not _OF_RANKS.match(name)}


def refuse_half_a_torchrun(environ: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError where torchrun is meant to run on several machines, but has not started this process.

    Every machine would train a run of its own. PET_...: torchrun's options, as operators of Kubernetes give them.
    """
    for name in ("PET_NNODES", "GROUP_WORLD_SIZE"):
        value = environ.get(name) or "1"
        if value not in ("1", "1:1") and not started_by_torchrun(environ):
            raise ConfigError(
                f"{name}={value}, but no torchrun has started this process: use moe-dist launch torchrun, "
                f"or unset {name}"
            )


def given_batch(environ: Mapping[str, str] = os.environ) -> int | None:
    """Sequences in a step of an elastic run, however many machines its first start has; None: not said."""
    text = environ.get(BATCH) or None
    if text is not None and (not text.isdecimal() or int(text) < 1):
        raise ConfigError(f"{BATCH}={text}: a whole number from 1")
    return None if text is None else int(text)


def named_job(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a launcher leaves its ranks, the same at each of their starts."""
    return {JOB: environ.get(JOB) or secrets.token_hex(8)}


def this_job(environ: Mapping[str, str] = os.environ) -> Job:
    """Which earlier starts belong to this one: the one rule for `checkpoint.resume`, whoever starts again.

    A name of our own is new with every job, so whoever knows it has been there. Slurm and torchrun call by one name
    what people may start several times, and count what is a start of the same.
    """
    counted = [("SLURM_JOB_ID", "SLURM_RESTART_COUNT")]
    if JOB not in environ:
        counted.append(("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"))
    known = [(JOB, True), *((name, (environ.get(count) or "0") != "0") for name, count in counted)]
    named = [(f"{name}={environ[name]}", again) for name, again in known if environ.get(name)]
    return Job(tuple(name for name, _ in named), tuple(name for name, again in named if again))


def usable_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def detect(environ: Mapping[str, str] = os.environ) -> Environment:
    """The environment of this process. Raises ConfigError naming the variable that does not fit."""
    if not started_by_torchrun(environ):
        return Environment()

    def number(name: str, default: str | None = None) -> int:
        text = environ.get(name) or default
        if text is None and name in environ:
            raise ConfigError(f"{name} is empty: a whole number, or unset it and start with torchrun")
        if text is None:
            other = "RANK" if name == "WORLD_SIZE" else "WORLD_SIZE"
            raise ConfigError(f"{name} is not set, but {other}={environ[other]}: start with torchrun, or unset {other}")
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"{name}={text}: a whole number") from None

    rank, world_size = number("RANK"), number("WORLD_SIZE")
    if world_size < 1:
        raise ConfigError(f"WORLD_SIZE={world_size}: at least 1")
    found = Environment(
        rank,
        number("LOCAL_RANK", str(rank)),
        world_size,
        number("LOCAL_WORLD_SIZE", str(world_size)),
    )
    if not 0 <= found.rank < world_size:
        raise ConfigError(f"RANK={found.rank}: from 0 to {world_size - 1} (WORLD_SIZE={world_size})")
    if not 1 <= found.local_world_size <= world_size:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE={found.local_world_size}: from 1 to {world_size} (WORLD_SIZE={world_size})"
        )
    if not 0 <= found.local_rank < found.local_world_size:
        raise ConfigError(
            f"LOCAL_RANK={found.local_rank}: from 0 to {found.local_world_size - 1} "
            f"(LOCAL_WORLD_SIZE={found.local_world_size})"
        )
    if found.is_distributed:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environ.get(name, "").strip():
                what = "empty" if name in environ else "not set"
                raise ConfigError(f"{name} is {what}, but WORLD_SIZE={world_size}: start with torchrun")
        port = number("MASTER_PORT")
        if not 0 < port < 2**16:
            raise ConfigError(f"MASTER_PORT={port}: from 1 to 65535")
    return found


def let_the_first_speak(environ: Mapping[str, str] = os.environ) -> None:
    """Under torchrun every rank finds the same mistake: one of each machine says it, torchrun ends the rest."""
    if started_by_torchrun(environ) and environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(2)


def join_slurm(environ: MutableMapping[str, str] = os.environ) -> None:
    """A task of srun becomes a rank: from here on the variables are there that torchrun would have set."""
    environ.update(from_slurm(environ))


def from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for a task that `srun` has started; nothing for everybody else.

    A batch script, the shell of `salloc` and a single task start their own ranks, and under torchrun the tasks are
    its agents. MASTER_ADDR and MASTER_PORT may be given. Raises ConfigError for variables that contradict each other.
    """
    asked = environ.get(SLURM, "")
    if asked not in ("", "0", "1"):
        raise ConfigError(f"{SLURM}={asked}: 1 (a task of srun is a rank) or 0 (leave Slurm alone)")
    if asked == "0" or "TORCHELASTIC_RUN_ID" in environ:
        return {}
    if not asked and _mpirun_is_between(environ):
        return {}
    step = environ.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= _SPECIAL_STEPS or "SLURM_PROCID" not in environ:
        if asked:
            raise ConfigError(f"{SLURM}=1, but no srun has started this process: use srun, or unset {SLURM}")
        return {}

    def named(*names: str) -> tuple[str, str]:
        for name in names:
            if environ.get(name):
                return name, environ[name]
        raise ConfigError(f"{names[0]} is not set in step {step} of srun; {SLURM}=0 leaves Slurm alone")

    def number(*names: str) -> int:
        name, text = named(*names)
        if not text.isdecimal():
            raise ConfigError(f"{name}={text}: a whole number")
        return int(text)

    # The step's own numbers: those of the job are also there, and may be larger.
    tasks = number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if tasks < 2 and not asked:
        return {}
    rank, local_rank, node = number("SLURM_PROCID"), number("SLURM_LOCALID"), number("SLURM_NODEID")
    name, text = named("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    per_node = tasks_per_node(name, text)
    if sum(per_node) != tasks:
        raise ConfigError(f"{name}={text}: {sum(per_node)} tasks, but srun has started {tasks}")
    if node >= len(per_node):
        raise ConfigError(f"SLURM_NODEID={node}: from 0 to {len(per_node) - 1} ({name}={text})")
    if local_rank >= per_node[node]:
        raise ConfigError(f"SLURM_LOCALID={local_rank}: from 0 to {per_node[node] - 1} ({name}={text})")
    if rank >= tasks:
        raise ConfigError(f"SLURM_PROCID={rank}: from 0 to {tasks - 1} (srun has started {tasks} tasks)")
    name, text = named("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    hosts = expand_nodes(name, text)
    if len(hosts) != len(per_node):
        raise ConfigError(f"{name}={text}: {len(hosts)} nodes, but there are tasks on {len(per_node)}")
    found = {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(per_node[node]),
    }
    for name, value in found.items():
        if environ.get(name, value) != value:
            raise ConfigError(
                f"{name}={environ[name]}, but in this task of srun it is {value}: "
                f"unset {name}, or set {SLURM}=0 to leave Slurm alone"
            )
    # Steps and jobs on one node meet at ports of their own, and so does every start of a job.
    job = number("SLURM_JOB_ID", "SLURM_JOBID")
    start = number("SLURM_RESTART_COUNT") if environ.get("SLURM_RESTART_COUNT") else 0
    port = _PORTS[(job + 4093 * int(step) + 7919 * start) % len(_PORTS)]
    return {
        **found,
        "MASTER_ADDR": environ.get("MASTER_ADDR") or hosts[0],
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port),
        TOKEN: f"slurm-{job}-{step}-{start}",
    }


def _mpirun_is_between(environ: Mapping[str, str]) -> bool:
    """Whether srun has started mpirun's daemon, and that one this process: Slurm's numbers are the daemon's."""
    pairs = (("SLURM_STEP_NUM_TASKS", "SIZE"), ("SLURM_PROCID", "RANK"))
    starters = ("OMPI_COMM_WORLD_", "PMI_")
    return any(
        start + what in environ and environ[start + what] != environ.get(slurm, "")
        for slurm, what in pairs
        for start in starters
    )


def ray_address(asked: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The Ray cluster to use: as asked, or as RAY_ADDRESS says (`ray job submit` sets it); None when nobody says.

    Raises ConfigError when both speak of different ones, and inside a rank: Ray would start ranks in it.
    """
    if started_by_torchrun(environ):
        name = "RANK" if "RANK" in environ else "WORLD_SIZE"
        raise ConfigError(
            f"{name}={environ[name]}: this process is a rank already, and Ray starts ranks itself: "
            f"use moe-dist train here, or unset {name}"
        )
    given = environ.get("RAY_ADDRESS")
    if asked and given and asked != given:
        raise ConfigError(f"--address {asked}, but RAY_ADDRESS={given}: leave one of them out")
    address = asked or given or None
    if address and address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: training cannot go through Ray Client; run the command on the cluster, "
            "by ray job submit or on its head, with --address auto"
        )
    return address


def tasks_per_node(name: str, text: str) -> list[int]:
    """`2(x3),1` is [2, 2, 2, 1]. Raises ConfigError with the variable's name."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"{name}={text}: tasks per node as in 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def expand_nodes(name: str, text: str) -> list[str]:
    """`node[1-2,07],gpu-a` is [node1, node2, node07, gpu-a]. Raises ConfigError with the variable's name."""
    wrong = ConfigError(f"{name}={text}: node names as in node[1-3,7],gpu-a")
    found: list[str] = []
    if not re.fullmatch(r"([^\[\],]|\[[\d,-]+\])+(,([^\[\],]|\[[\d,-]+\])+)*", text):
        raise wrong
    for item in re.findall(r"(?:[^\[\],]|\[[^\]]*\])+", text):
        pieces: list[list[str]] = []
        for piece in re.findall(r"\[[^\]]*\]|[^\[\]]+", item):
            if not piece.startswith("["):
                pieces.append([piece])
                continue
            choices: list[str] = []
            for part in piece[1:-1].split(","):
                match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
                if match is None or int(match[2] or match[1]) < int(match[1]):
                    raise wrong
                last = int(match[2] or match[1])
                choices += [str(number).zfill(len(match[1])) for number in range(int(match[1]), last + 1)]
            pieces.append(choices)
        found += ["".join(chosen) for chosen in itertools.product(*pieces)]
    return found
