"""Checkpoints in a folder of this machine, or of a file system that several share."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.storage.base import LEFTOVER, Buffer, Storage, step_folder, steps_in
from moe_dist.checkpoint.storage.manifest import FILE, CheckpointError, Manifest

_READ = 2 * 2**20
"""Bytes of a local file read at a time: they are hashed while the processor's own cache still holds them."""


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
            return steps_in(os.listdir(self.root))
        return []

    def manifest(self, step: int) -> Manifest:
        folder = self.root / step_folder(step)
        if folder.is_symlink():
            raise CheckpointError(f"{folder}: is a link, and links are not followed; name the folder it leads to")
        return super().manifest(step)

    def leftovers(self) -> list[str]:
        return sorted(name for name in self.folders() if LEFTOVER.fullmatch(name))

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


def _flush_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
