"""Who am I? Rank and world size, from the variables a starter leaves behind. Imports no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from moe_dist.config_loading import ConfigError


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


def usable_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def detect(environ: Mapping[str, str] = os.environ) -> Environment:
    """The environment of this process. Raises ConfigError naming the variable that does not fit."""
    if not started_by_torchrun(environ):
        return Environment()

    def number(name: str, default: str | None = None) -> int:
        text = environ.get(name, default)
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
            if name not in environ:
                raise ConfigError(f"{name} is not set, but WORLD_SIZE={world_size}: start with torchrun")
        number("MASTER_PORT")
    return found


def let_the_first_speak(environ: Mapping[str, str] = os.environ) -> None:
    """Under torchrun every rank finds the same mistake: one of each machine says it, torchrun ends the rest."""
    if started_by_torchrun(environ) and environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(2)
