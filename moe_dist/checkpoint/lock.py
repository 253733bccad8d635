"""One writer per run folder. Imports no torch."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moe_dist.checkpoint.manifest import CheckpointError

FILE = ".run.lock"
LAST_STEP = ".last-step"
_MOST_NAMES = 100  # each machine of a job may have one of its own; a few that are still there are enough


class Job(NamedTuple):
    """One start among those of a job: ranks started again, a job put back into the queue, a pod made anew.

    `names`: what the job is called, to be noted once it has begun. `earlier`: those of them that only an earlier start
    of the same job can have noted.
    """

    names: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()


@dataclass
class RunLock:
    """Held by rank 0 for as long as a run writes. The kernel lets go of it when the process ends, however it ends.

    `run` names the run for good; `generation` counts its starts. Where locks do not reach (some network file
    systems), `check` still sees that a newer start has taken over.
    """

    path: Path
    run: str
    generation: int
    begun: tuple[str, ...]
    """Names of the last job that has begun here: from then on its starts go on from what it has saved itself."""
    _descriptor: int

    @staticmethod
    def acquire(folder: Path, at_least: int = 0) -> RunLock:
        """Raises CheckpointError naming the process that holds `folder`. `at_least`: a generation already seen."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(
                f"train.output_dir={folder}: another run is writing there ({_who(path)}); stop it, or choose another "
                "folder"
            ) from None
        before = _read(path)
        run = str(before.get("run") or secrets.token_hex(8))
        generation = max(int(before.get("generation", 0)), at_least) + 1
        content = {
            "run": run,
            "generation": generation,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "begun": before.get("begun", []),
        }
        _write(descriptor, content)
        return RunLock(path, run, generation, tuple(content["begun"]), descriptor)

    def note_begun(self, names: Iterable[str]) -> None:
        """The job of these names has begun: whatever it goes on from is settled, and nothing else is in its way."""
        now = _read(self.path)
        if now.get("generation") == self.generation:  # else the next save says who has taken over
            self.begun = tuple(sorted(names)[:_MOST_NAMES])
            _write(self._descriptor, {**now, "begun": self.begun})

    def check(self) -> None:
        """Raises CheckpointError when a newer start of this run has taken over: this process must not write."""
        now = _read(self.path)
        if now.get("generation", self.generation) > self.generation:
            raise CheckpointError(
                f"{self.path.parent}: start {now['generation']} of this run (process {now.get('pid')} on "
                f"{now.get('host')}) has taken over from start {self.generation}; nothing more is written here"
            )

    def note(self, checkpoint: str | None) -> None:
        """Remember the newest committed checkpoint here, where it is known even when its own place is not mounted."""
        file = self.path.with_name(LAST_STEP)
        if checkpoint is None:
            file.unlink(missing_ok=True)
            return
        whole = file.with_suffix(".part")
        whole.write_text(json.dumps({"checkpoint": checkpoint}) + "\n")
        whole.replace(file)

    @property
    def noted(self) -> str | None:
        """The checkpoint that `note` was last told of."""
        return _read(self.path.with_name(LAST_STEP)).get("checkpoint")

    def release(self) -> None:
        """Let others in."""
        os.close(self._descriptor)


@contextmanager
def quiet(folder: Path, why: str) -> Iterator[bool]:
    """Keep runs from starting in `folder` for a while, without being a start of the run.

    Gives False when no run has ever been locked there. Raises CheckpointError, beginning with `why`, while one runs.
    """
    try:
        descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{why}: a run is writing in {folder} ({_who(folder / FILE)}); wait, or stop it"
            ) from None
        yield True
    finally:
        os.close(descriptor)


def begun(folder: Path) -> tuple[str, ...]:
    """As `RunLock.begun`, for those who only look; empty when nobody can say."""
    return tuple(_read(folder / FILE).get("begun", []))


def _write(descriptor: int, content: dict) -> None:
    text = json.dumps(content, indent=1).encode() + b"\n"
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))
    os.fsync(descriptor)


def _who(path: Path) -> str:
    held = _read(path)
    return f"process {held.get('pid', '?')} on {held.get('host', '?')}, started {held.get('started', '?')}"


def _read(path: Path) -> dict:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_bytes()[:65536])
        if isinstance(content, dict):
            return content
    return {}
