"""What a launcher gives a rank to do, and the way by which the rank answers. Imports no torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

FORKED = "MOE_DIST_FORKSERVER"
"""In the environment of a fork server: its end of the socket on which it is asked for ranks."""
PRELOADED = "MOE_DIST_PRELOADED"
"""In the environment of a fork server: modules beside those that every rank imports, with blanks between."""
# What the local launcher leaves in a rank's environment.
CONFIG, PROOF, LAUNCHER = "MOE_DIST_CONFIG", "MOE_DIST_PROOF", "MOE_DIST_LAUNCHER"
# ... and an agent too (launcher.supervise.rank_channel): where a rank says what went wrong, and where it is.
REPORTS, STATUS = "MOE_DIST_REPORTS", "MOE_DIST_STATUS"
WATCHED = "MOE_DIST_WATCHED"
"""Set by a launcher that sees all ranks from outside: they need not watch each other."""

MAX_REPORT = 2000
"""Characters of what a rank says: it must go through the pipe in one piece."""


@dataclass(frozen=True)
class Proof:
    """What `moe-dist verify` asks of every rank."""

    layouts: str = "all"
    plant: str | None = None
    as_json: bool = False
    seed: int = 0
    minutes: float | None = None
    """Go on with cases drawn at random for so long."""
    file: str | None = None
    """Where verdicts are kept for a start after a rank has died."""
    command: str = "moe-dist verify CONFIG"
    """That repeats one case, up to its name."""


@dataclass(frozen=True)
class Profiling(Proof):
    """What `moe-dist profile` asks of every rank; it travels as a proof does, and like one is never started again."""

    steps: int = 10
    compute: bool = True
    memory: bool = False
    folder: str | None = None
    """Where the page goes; None: into the run folder."""


@dataclass(frozen=True)
class Inference(Proof):
    """What `moe-dist generate` and others that use a model ask of every rank; it travels as a proof does.

    `checkpoint`: the folder of one, None where the configuration names a Hugging Face folder. `keys`: where keys of
    sealed checkpoints are. `options`: of the command itself.
    """

    verb: str = "generate"
    checkpoint: str | None = None
    keys: tuple[str, ...] = ()
    int8: bool = False
    """Weights of experts and linear maps as int8."""
    options: dict[str, Any] = field(default_factory=dict)


def as_text(proof: Proof | None) -> str:
    """For a rank's environment."""
    return json.dumps(proof and {"kind": type(proof).__name__, **asdict(proof)})


def from_text(text: str) -> Proof | None:
    """`as_text` backwards."""
    found = json.loads(text)
    return found and {kind.__name__: kind for kind in (Proof, Profiling, Inference)}[found.pop("kind")](**found)


@cache
def channel(name: str) -> int | None:
    """The open file that a launcher has left in this variable, by its number, or by a path as from an agent."""
    text = os.environ.get(name)
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    try:
        return os.open(text, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None  # it has gone, and this process soon will


def tell_launcher(rank: int, text: str | None) -> bool:
    """Words for the launcher or agent, None when a signal has been heard; False when there is none that listens."""
    reports = channel(REPORTS)
    if reports is None:
        return False
    os.write(reports, json.dumps([rank, text and text[:MAX_REPORT]]).encode() + b"\n")
    return True
