"""Where checkpoints live: a folder on disk, or an object store. Imports no torch.

The order of a commit is in `Storage.commit`: on disk everything is flushed under a temporary name, the manifest last,
and one rename makes it a checkpoint; in an object store, which knows no rename, the manifest is the last object.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.manifest import FILE, MAX_BYTES, CheckpointError, Manifest, from_text, to_text

CHUNK = 8 * 2**20
"""Bytes written or fetched at a time."""
_READ = 2 * 2**20
"""Bytes of a local file read at a time: they are hashed while the processor's own cache still holds them."""
STEP = re.compile(r"checkpoint-(0|[1-9]\d{0,15})")
_SET_ASIDE = re.compile(r"aside-\d+-checkpoint-\d+(-\d+)?")
_LEFTOVER = re.compile(r"\.checkpoint-\d+\.\d+\.tmp|\.trash-checkpoint-.*")
OURS = re.compile(r"shard-\d+-\d+(-\d+)?\.safetensors|receipt-\d+-\d+\.json|trainer_state\.json")
_OF_A_START = re.compile(r"(?:shard|receipt)-(\d+)-")

Buffer = bytes | memoryview


def step_folder(step: int) -> str:
    """Name of the folder of a committed step."""
    return f"checkpoint-{step}"


def set_aside_name(name: str) -> bool:
    """Whether `Storage.set_aside` has given this name."""
    return _SET_ASIDE.fullmatch(name) is not None


def generation_of(name: str) -> int | None:
    """The start of a run that wrote this file; None when its name does not tell."""
    match = _OF_A_START.match(name)
    return int(match[1]) if match else None


class Storage(ABC):
    """A place with checkpoints in it. Paths are `<folder>/<file>` relative to it."""

    where: str
    """For people."""
    renames = True
    """Whether a committed step can be given another name."""
    poll: float = 0.01
    """Seconds between two looks at whether something is there."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Everything at the top that could be a checkpoint or what is left of one."""

    @abstractmethod
    def staging(self, step: int, generation: int) -> str:
        """Name of the folder that a save fills before it is committed."""

    @abstractmethod
    def begin(self, folder: str, generation: int) -> None:
        """Make an empty staging folder for this start of the run."""

    @abstractmethod
    def write(self, path: str, chunks: Iterable[Buffer]) -> None:
        """Write a file so that it survives a power cut; on failure nothing of that name is worth anything."""

    @abstractmethod
    def put(self, path: str, content: bytes) -> None:
        """Write a small file such that whoever sees it sees all of it."""

    @abstractmethod
    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """A whole file. Raises FileNotFoundError; CheckpointError when it is longer than `max_bytes`."""

    @abstractmethod
    def chunks(self, path: str) -> Iterator[Buffer]:
        """A file piece by piece."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Bytes of a plain file; None when there is none (a link is none)."""

    @abstractmethod
    def files(self, folder: str) -> list[str]:
        """Names inside a folder."""

    @abstractmethod
    def _publish(self, staging: str, step: int, manifest: bytes) -> None: ...

    @abstractmethod
    def remove(self, folder: str) -> None:
        """Delete a folder such that a crash in between leaves no checkpoint that looks whole."""

    @abstractmethod
    def remove_file(self, path: str) -> None:
        """Delete one file; nothing happens when it is not there."""

    def set_aside(self, step: int, generation: int) -> str:
        """Give a step another name, under which it is none, and return it. Only where `renames`."""
        raise NotImplementedError

    def free_bytes(self) -> int | None:
        """Room left, None where nobody can say."""
        return None

    def local_path(self, path: str) -> Path | None:
        """The file on this machine, None when it is elsewhere."""
        return None

    def steps(self) -> list[int]:
        """Committed steps, oldest first: folders of the right name with a manifest in them."""
        found = _steps_in(self.folders())
        return [step for step in found if self.size(f"{step_folder(step)}/{FILE}") is not None]

    def candidates(self) -> list[int]:
        """Steps that were committed once, oldest first, whatever has become of them since."""
        return self.steps()

    def is_ours(self, step: int) -> bool:
        """Whether a folder with the name of a step holds anything that a run writes, whole or damaged."""
        return any(name == FILE or OURS.fullmatch(name) for name in self.files(step_folder(step)))

    def newest_generation(self) -> int:
        """The highest start of a run that has left files here, committed or not; 0 when none has."""
        ours = (name for name in self.folders() if STEP.fullmatch(name) or _LEFTOVER.fullmatch(name))
        return max((generation_of(name) or 0 for folder in ours for name in self.files(folder)), default=0)

    @abstractmethod
    def leftovers(self) -> list[str]:
        """What saves and deletions that were cut short have left behind: ours for certain, and worth nothing."""

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step. Raises CheckpointError when there is none, or it is damaged or another step's."""
        path = f"{step_folder(step)}/{FILE}"
        where = f"{self.where}/{path}"
        if self.size(path) is None:
            raise CheckpointError(f"{self.where}/{step_folder(step)}: no complete checkpoint there{self._beside()}")
        manifest = from_text(self.read(path, MAX_BYTES), where)
        if manifest.step != step:
            raise CheckpointError(f"{where}: damaged: it is of step {manifest.step}")
        return manifest

    def commit(self, staging: str, manifest: Manifest) -> str:
        """Make a filled staging folder the checkpoint of its step. Returns the folder's name.

        Raises CheckpointError when that step is committed already: nothing is ever overwritten.
        """
        self.refuse_existing(manifest.step)
        self._publish(staging, manifest.step, to_text(manifest))
        return step_folder(manifest.step)

    def refuse_existing(self, step: int) -> None:
        """Raises CheckpointError when a step is committed."""
        if self.size(f"{step_folder(step)}/{FILE}") is not None:
            raise CheckpointError(
                f"{self.where}/{step_folder(step)}: is there already, and no checkpoint is ever overwritten"
            )

    def discard(self, staging: str, generation: int) -> None:
        """Remove what this start of the run has put into a staging folder that will not be committed."""
        self.remove(staging)

    def _beside(self) -> str:
        names = ", ".join(step_folder(step) for step in self.steps()[-5:])
        return f" (complete ones beside it: {names or 'none'})"


class LocalStorage(Storage):
    """A folder of this machine, or one that it has mounted."""

    def __init__(self, root: Path) -> None:
        self.root, self.where = root, str(root)

    def folders(self) -> list[str]:
        with suppress(FileNotFoundError), os.scandir(self.root) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return []

    def candidates(self) -> list[int]:
        # A step gets its name together with its manifest: without one, or as a link, it is damage and not a beginning.
        with suppress(FileNotFoundError):
            return _steps_in(os.listdir(self.root))
        return []

    def manifest(self, step: int) -> Manifest:
        folder = self.root / step_folder(step)
        if folder.is_symlink():
            raise CheckpointError(f"{folder}: is a link, and links are not followed; name the folder it leads to")
        return super().manifest(step)

    def leftovers(self) -> list[str]:
        return sorted(name for name in self.folders() if _LEFTOVER.fullmatch(name))

    def staging(self, step: int, generation: int) -> str:
        return f".{step_folder(step)}.{generation}.tmp"

    def begin(self, folder: str, generation: int) -> None:
        shutil.rmtree(self.root / folder, ignore_errors=True)
        (self.root / folder).mkdir(parents=True)

    def write(self, path: str, chunks: Iterable[Buffer]) -> None:
        self._write(path, chunks, flush=True)

    def _write(self, path: str, chunks: Iterable[Buffer], flush: bool) -> None:
        with open(self.root / path, "xb", buffering=0) as file:
            position = 0
            for chunk in chunks:
                view = memoryview(chunk)
                while view:  # a write may take less than it is given
                    view = view[file.write(view) :]
                if flush:
                    _start_flushing(file.fileno(), position, len(chunk))
                position += len(chunk)
            if flush:
                os.fsync(file.fileno())

    def put(self, path: str, content: bytes) -> None:
        self.remove_file(f"{path}.part")
        self._write(f"{path}.part", [content], flush=False)  # for those who wait for it now, not for after a power cut
        os.rename(self.root / f"{path}.part", self.root / path)

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        with self._open(path) as file:
            content = file.read() if max_bytes is None else file.read(max_bytes + 1)
        if max_bytes is not None and len(content) > max_bytes:
            raise CheckpointError(f"{self.where}/{path}: longer than the {max_bytes} bytes it may have")
        return content

    def chunks(self, path: str) -> Iterator[Buffer]:
        buffer = bytearray(_READ)
        view = memoryview(buffer)
        with self._open(path) as file:
            while count := file.readinto(buffer):
                yield view[:count]

    def _open(self, path: str) -> Any:
        return os.fdopen(os.open(self.root / path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0)

    def size(self, path: str) -> int | None:
        file = self.root / path
        with suppress(FileNotFoundError, NotADirectoryError):
            status = os.lstat(file)
            if os.path.isfile(file) and not os.path.islink(file):
                return status.st_size
        return None

    def files(self, folder: str) -> list[str]:
        with suppress(FileNotFoundError):
            return sorted(os.listdir(self.root / folder))
        return []

    def _publish(self, staging: str, step: int, manifest: bytes) -> None:
        final = self.root / step_folder(step)
        self.write(f"{staging}/{FILE}", [manifest])
        _flush_folder(self.root / staging)
        try:
            os.rename(self.root / staging, final)  # replaces an empty folder, never one that holds anything
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise CheckpointError(f"{final}: is in the way and no checkpoint of ours; move it elsewhere") from error
        _flush_folder(self.root)

    def remove(self, folder: str) -> None:
        path = self.root / folder
        if not path.exists():
            return
        trash = path if folder.startswith(".trash-") else self._free(f".trash-{folder.lstrip('.')}")
        if trash != path:
            os.rename(path, trash)
            _flush_folder(self.root)
        shutil.rmtree(trash)

    def _free(self, name: str) -> Path:
        names = (f"{name}{suffix}" for suffix in ("", *(f"-{n}" for n in range(1, 10000))))
        return next(path for name in names if not os.path.lexists(path := self.root / name))

    def set_aside(self, step: int, generation: int) -> str:
        path = self._free(f"aside-{generation}-{step_folder(step)}")
        os.rename(self.root / step_folder(step), path)
        _flush_folder(self.root)
        return path.name

    def remove_file(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        path = self.root
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    def local_path(self, path: str) -> Path | None:
        return self.root / path


def same_place(one: Storage, other: Storage) -> bool:
    """Whether both are the same folder, however it is written."""
    here, there = one.local_path("."), other.local_path(".")
    return one.where == other.where if here is None or there is None else here.resolve() == there.resolve()


def open_storage(place: str | Path) -> Storage:
    """The storage at a path or URL."""
    text = str(place)
    if "://" in text and not text.startswith("file://"):
        from moe_dist.checkpoint.object_storage import ObjectStorage  # only those who use it load what it needs

        return ObjectStorage(text)
    return LocalStorage(Path(text.removeprefix("file://")))


def _start_flushing(descriptor: int, position: int, count: int) -> None:
    """Have the disk work on what is written so far while the rest is hashed and copied; waits for nothing.

    `fsync` then has little left to do. A third less time for a file of 500 MB; elsewhere than on Linux, a no-op.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, position, count, _WRITE)


def _find_sync_file_range() -> Any:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


_sync_file_range = _find_sync_file_range() if sys.platform == "linux" else None
_WRITE = 2
"""SYNC_FILE_RANGE_WRITE of <fcntl.h>."""


def _steps_in(names: Iterable[str]) -> list[int]:
    return sorted(int(match[1]) for name in names if (match := STEP.fullmatch(name)))


def _flush_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
