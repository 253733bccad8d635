"""How a start has ended: what went wrong first, in one line. Imports no torch."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from launcher.connect.exit_codes import (
    EXIT_AGAIN,
    EXIT_CONFIG,
    EXIT_CTRL_C,
    EXIT_DIFFERS,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_UNSEEN,
)
from launcher.connect.output import EXIT_PIPE
from launcher.supervise.oom_advice import OomKills, is_of_memory
from moe_dist.checkpoint.lock import begun
from moe_dist.checkpoint.storage import open_storage, step_folder
from moe_dist.config import Config
from moe_dist.monitor.train_log import log_path
from moe_dist.parallel.status import Position


class Ended(NamedTuple):
    """A rank that has ended by itself. `code`: as in subprocess, negative for a signal."""

    rank: int
    pid: int
    code: int


def newest_step(config: Config) -> int:
    """The newest committed step of the run folder, -1 when there is none or nobody can say."""
    try:
        steps = open_storage(config.checkpoint.folder or config.train.output_dir).steps()
    except Exception:  # of an object store it may be anything, and whoever asks must not end of it
        return -1
    return steps[-1] if steps else -1


class Tries:
    """Starts in a row that got no further than a checkpoint; more than `limit` are enough."""

    def __init__(self, config: Config, limit: int, job: str) -> None:
        """`job`: its name (`launcher.connect.environment.JOB`)."""
        self.config, self.limit, self.job = config, limit, job
        self.count, self.furthest = 0, newest_step(config)

    def again(self) -> str | None:
        """One more start has failed: where the next one goes on from, in words; None when there shall be none."""
        step = newest_step(self.config)
        # Fewer than before: what it does not go on from has been set aside.
        further = step >= 0 and step != self.furthest
        self.count, self.furthest = (1, step) if further else (self.count + 1, self.furthest)
        if self.count > self.limit:
            return None
        return f"; starting again {self.resuming(step)} (try {self.count} of {self.limit})"

    def resuming(self, step: int) -> str:
        """Where the next start begins, in words. `step`: the newest that is saved."""
        resume = self.config.checkpoint.resume
        has_begun = any(self.job in name for name in begun(self.config.train.output_dir))
        if resume != "auto" and not has_begun:
            return f"with checkpoint.resume={resume}"
        return f"from {step_folder(step)}" if step >= 0 else "at the beginning"

    @property
    def summary(self) -> str:
        where = f"step {self.furthest}" if self.furthest >= 0 else "a first checkpoint"
        return f"error: {self.count} starts in a row have ended like this without getting past {where}; giving up"


class End(NamedTuple):
    """How one start of a run has ended, and the line that says it (None: it has been said).

    `in_step`: a rank has failed after it had begun a step.
    """

    code: int
    line: str | None = None
    log: str | None = None
    in_step: bool = False

    @property
    def lacks_memory(self) -> bool:
        """Whether a step has needed more memory than there is: smaller micro-batches need less."""
        return self.code == EXIT_FAILED and self.in_step and is_of_memory(self.line or "")


def say_end(end: End, more: str = "") -> None:
    if end.line is not None:
        say(end.line + more + (f"; log: {end.log}" if end.log else ""))


def note(end: End, folder: Path) -> None:
    """Write a failure into the log of the run too, for `doctor` and the report."""
    if end.code == EXIT_FAILED and end.line is not None:
        from moe_dist.monitor.sinks.jsonl import note_failure  # numpy and more, for the few runs that fail

        note_failure(folder, end.line.removeprefix("error: "))


def verdict(
    failed: list[Ended],
    messages: dict[int, str],
    positions: dict[int, Position],
    folder: Path | None,
    alone: bool,
    oom_kills: OomKills,
    host: str = "",
) -> End:
    """Say what went wrong first. A rank ended from outside is the cause, whatever its peers said before, unless they
    have said it of that rank: that it stood still, and had to be ended. Ranks that have only lost another are not.

    `folder`: of the run, if it is known. `alone`: there is one rank in all. `oom_kills`: made when the ranks were
    started. `host` is named when there are several.
    """
    if not failed:
        return End(0)
    restore_terminal()
    # Not SIGABRT: that is how libraries give up when a peer is gone.
    killed = [end for end in failed if end.code < 0 and end.code != -signal.SIGABRT]
    spoke = [end for rank in messages for end in failed if end.rank == rank]
    sound = [end for end in spoke if not lost_a_peer(messages[end.rank])]
    silent = [end for end in failed if end.rank not in messages]
    cause = (killed or sound or silent or spoke)[0]
    who = f"the process (pid {cause.pid})" if alone else f"rank {cause.rank} (pid {cause.pid}{host and ' on ' + host})"
    others = "" if alone else "; the other ranks were stopped"
    path = None if folder is None else log_path(folder, cause.rank)
    log = str(path) if path is not None and path.is_file() else None  # there is none before training has begun
    position = positions.get(cause.rank)
    in_step = position is not None and position.step > 0
    where = f" {position}" if in_step else ""
    if cause.code in (EXIT_AGAIN, EXIT_CTRL_C):
        return End(cause.code, messages.get(0, "stopped on request"))
    if cause.code < 0 and cause.rank not in messages:
        name = signal.Signals(-cause.code).name
        hint = oom_kills.why_killed() if name == "SIGKILL" else ""
        return End(EXIT_FAILED, f"error: {who} was ended by {name}{where}{hint}{others}", log, in_step)
    spoken = (EXIT_STOPPED, EXIT_DIFFERS, EXIT_UNSEEN, EXIT_PIPE)  # rank 0 has said why, or nobody listens
    code = cause.code if cause.code in (EXIT_CONFIG, *spoken) else EXIT_FAILED
    if cause.rank in messages:
        return End(code, f"error: {messages[cause.rank]}", in_step=in_step)
    if cause.code in spoken:
        return End(code)
    return End(code, f"error: {who} ended with exit code {cause.code}{where}{others}", log)


def restore_terminal() -> None:
    """Rank 0 may have ended with its cursor hidden, in the middle of a line."""
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        print("\x1b[?25h", flush=True)


def say(text: str) -> None:
    """One line for people; nothing happens when their terminal has gone."""
    with suppress(OSError):
        print(f"moe-dist: {text}", file=sys.stderr, flush=True)


def lost_a_peer(text: str) -> bool:
    """Whether a collective has failed because another rank is not there any more, in the words of gloo and NCCL."""
    words = ("closed by peer", "reset by peer", "broken pipe", "remote process exited", "connection refused")
    return any(word in text.lower() for word in words)
