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

from moe_dist.checkpoint.storage.manifest import CheckpointError

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

    `run` names the run for good; `generation` counts its starts, `token` names this one. Where locks do not reach
    (some network file systems), and in a folder that was removed and made anew, `check` still sees another writer.
    """

    path: Path
    run: str
    generation: int
    begun: tuple[str, ...]
    """Names of the last job that has begun here: from then on its starts go on from what it has saved itself."""
    token: str
    _descriptor: int
    _before: bytes
    """What stood in it."""
    _made: tuple[Path, ...]
    """Folders that did not exist, the innermost first."""
    _has_begun: bool = False

    @property
    def is_first(self) -> bool:
        """Whether no run has ever been locked in this folder before."""
        return not self._before

    @staticmethod
    def acquire(folder: Path, at_least: int = 0) -> RunLock:
        """Raises CheckpointError naming the process that holds `folder`. `at_least`: a generation already seen."""
        made = _make_folder(folder)
        path = folder / FILE
        try:
            descriptor = _open_locked(path)
            text, before = path.read_bytes(), _read(path)
            run = str(before.get("run") or secrets.token_hex(8))
            generation = max(int(before.get("generation", 0)), at_least) + 1
            begun = tuple(before.get("begun", []))
            lock = RunLock(path, run, generation, begun, secrets.token_hex(8), descriptor, text, made)
        except BaseException:
            _remove_empty(made)
            raise
        try:
            lock._write_content()
        except BaseException:
            lock.leave()
            raise
        return lock

    def begin(self, run: str, names: Iterable[str]) -> None:
        """Everything is settled: what this start goes on from, under which name, and nothing is in its way.

        `run`: a new one when it starts afresh. `names`: of the job. Raises CheckpointError as `check` does.
        """
        self.check()
        self.run, self.begun = run, tuple(sorted(names)[:_MOST_NAMES])
        self._write_content()
        self._has_begun = True

    def _write_content(self) -> None:
        content = {
            "run": self.run,
            "generation": self.generation,
            "token": self.token,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "begun": self.begun,
        }
        self._put(json.dumps(content, indent=1).encode() + b"\n")

    def _put(self, text: bytes) -> None:
        os.pwrite(self._descriptor, text, 0)
        os.ftruncate(self._descriptor, len(text))
        os.fsync(self._descriptor)

    def check(self) -> None:
        """Raises CheckpointError when this process must not write: the folder has gone, or is another writer's."""
        if not os.path.lexists(self.path):
            raise CheckpointError(
                f"train.output_dir={self.path.parent}: removed or moved while the run was writing there"
                f"{self._moved_to()}; nothing more is written"
            )
        now = _read(self.path)
        if now.get("token", self.token) == self.token:
            return
        who = f"(process {now.get('pid')} on {now.get('host')}) has taken over from start {self.generation}"
        start = f"start {now.get('generation')} of "
        if now.get("run") == self.run:
            raise CheckpointError(f"{self.path.parent}: {start}this run {who}; nothing more is written here")
        raise CheckpointError(f"{self.path.parent}: {start}another run {who}; nothing more is written here")

    def _moved_to(self) -> str:
        """Where the lock is now, in words; empty where the kernel does not tell."""
        with suppress(OSError):
            now = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
            if now.exists() and now != self.path:
                return f" (it is {now.parent} now)"
        return ""

    def note(self, checkpoint: str | None) -> None:
        """Remember the newest committed checkpoint here, where it is known even when its own storage is not mounted."""
        file = self.path.with_name(LAST_STEP)
        if checkpoint is None:
            file.unlink(missing_ok=True)
            return
        whole = file.with_suffix(".part")
        whole.write_text(json.dumps({"checkpoint": checkpoint}) + "\n")
        whole.replace(file)

    @property
    def noted(self) -> str | None:
        """The checkpoint that `note` was last given."""
        return _read(self.path.with_name(LAST_STEP)).get("checkpoint")

    def release(self) -> None:
        """Let others in."""
        os.close(self._descriptor)

    def leave(self) -> None:
        """As `release`; of a start that has not begun nothing is left."""
        ours = _read(self.path).get("token") in (self.token, None)  # None: not even written
        if ours and not self._has_begun:
            if self.is_first:
                self.path.unlink(missing_ok=True)
            else:
                self._put(self._before)
        self.release()
        if not self._has_begun:
            _remove_empty(self._made)


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


def _make_folder(folder: Path) -> tuple[Path, ...]:
    """Make a folder with its parents; returns those that did not exist, the innermost first."""
    missing = []
    above = folder
    while not os.path.lexists(above):
        missing.append(above)
        above = above.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        _remove_empty(missing)
        raise
    return tuple(missing)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove these folders as far as nothing is in them."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _open_locked(path: Path) -> int:
    """The descriptor of the locked file. Raises CheckpointError when another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(
                f"train.output_dir={path.parent}: another run is writing there ({_who(path)}); stop it, or choose "
                "another folder"
            ) from None
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # a start that has not begun removed it in this very moment


def _who(path: Path) -> str:
    held = _read(path)
    return f"process {held.get('pid', '?')} on {held.get('host', '?')}, started {held.get('started', '?')}"


def _read(path: Path) -> dict:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_bytes()[:65536])
        if isinstance(content, dict):
            return content
    return {}
