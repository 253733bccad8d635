"""`moe-dist launch mpi`: the command line of the mpirun that is there. Imports no torch and no MPI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.backends.command import TRAIN, Start, chosen, for_world
from launcher.connect.mpi import MPI
from launcher.supervise.processes import rank_environment
from moe_dist.config import Config, ConfigError

OPEN_MPI, MPICH = "Open MPI", "MPICH"
_PASSED = ("PYTHONPATH", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "OMP_NUM_THREADS")
_SAYS = {OPEN_MPI: r"Open MPI|OpenRTE|PRRTE", MPICH: r"HYDRA|MPICH|Intel\(R\) MPI"}


@dataclass(frozen=True)
class Request:
    """What a person asks mpirun for. None: what fits."""

    ranks: int | None = None
    hosts: str | None = None
    """As in node1:8,node2:8."""
    hostfile: str | None = None
    mpirun: str | None = None
    """The program; by default the one beside this Python, else the first on the PATH."""
    options: tuple[str, ...] = ()
    """More words for mpirun, as they are."""


def plan(
    path: str,
    overrides: Sequence[str],
    config: Config,
    request: Request,
    notice: Callable[[str], None] = lambda text: None,
) -> Start:
    """What `moe-dist launch mpi` runs. Raises ConfigError when it could not work."""
    slots = _slots(request.hosts)
    if request.hosts and request.hostfile:
        raise ConfigError(f"--hosts {request.hosts}: and --hostfile {request.hostfile}: one of them")
    ranks = request.ranks or (sum(slots.values()) if slots else config.launch.nproc_per_node)
    config = for_world(config, ranks, notice, per_host=max(slots.values(), default=ranks))
    overrides = [*overrides, *chosen(config)]
    program = _program(request.mpirun)
    family = family_of(program)
    # On several machines the libraries look for their interface themselves.
    variables = {} if slots or request.hostfile else _alone(config, ranks)
    if ranks == 1:
        variables[MPI] = "1"
    command = [program, "-n", str(ranks)]
    if family == OPEN_MPI:
        command += ["--host", request.hosts] if request.hosts else []
        command += ["--hostfile", request.hostfile] if request.hostfile else []
        command += ["--bind-to", "none"]  # else all threads of a rank share one core
        # MPICH's takes all variables to other machines, Open MPI's those that it is told.
        passed = [*variables, *(name for name in _PASSED if name in os.environ and name not in variables)]
        command += [word for name in passed for word in ("-x", name)]
    else:
        command += ["-hosts", request.hosts] if request.hosts else []
        command += ["-f", request.hostfile] if request.hostfile else []
    command += [*request.options, sys.executable, *TRAIN, path, *overrides]
    return Start(variables, tuple(command))


def family_of(program: str) -> str:
    """Whose mpirun it is, by what it says: they take hosts and variables in different ways."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{program} --version: {error}") from error
    for family, pattern in _SAYS.items():
        if re.search(pattern, done.stdout + done.stderr):
            return family
    said = " ".join((done.stdout + done.stderr).split())[:100]
    raise ConfigError(f"{program}: neither Open MPI's mpirun nor MPICH's; it says: {said or 'nothing'}")


def _program(wanted: str | None) -> str:
    """The mpirun that belongs to the MPI library of this Python, or any."""
    if wanted is not None:
        found = shutil.which(wanted)
        if found is None:
            raise ConfigError(f"--mpirun {wanted}: there is no such program")
        return found
    beside = str(Path(sys.executable).parent)
    for folder in (beside, None):
        for name in ("mpirun", "mpiexec"):
            if found := shutil.which(name, path=folder):
                return found
    raise ConfigError("no mpirun on this machine: pip install 'moe-dist[mpi]' mpich, or load your cluster's MPI")


def _slots(hosts: str | None) -> dict[str, int]:
    """`a:2,b:2` is {a: 2, b: 2}; a name alone has one."""
    found = {}
    for part in (hosts or "").split(",") if hosts else ():
        match = re.fullmatch(r"([\w.-]+)(?::(\d+))?", part)
        if match is None or match[2] == "0":
            raise ConfigError(f"--hosts {hosts}: names with the number of ranks on each, as in node1:8,node2:8")
        found[match[1]] = int(match[2] or 1)
    return found


def _alone(config: Config, ranks: int) -> dict[str, str]:
    """What ranks need that share this machine, unless somebody has set it."""
    mine = config.model_copy(deep=True)
    mine.launch.nproc_per_node = ranks
    return rank_environment(mine)
