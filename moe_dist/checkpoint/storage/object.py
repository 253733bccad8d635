"""Checkpoints in an object store, through fsspec. Imports no torch."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from moe_dist.checkpoint.storage.base import CHUNK, OURS, STEP, Buffer, Storage, generation_of, step_folder
from moe_dist.checkpoint.storage.manifest import FILE, CheckpointError

_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "oss"})
"""Stores of objects in buckets: no folder is ever made there, and no bucket that a typing error asks for."""


class ObjectStorage(Storage):
    """Anything fsspec can reach, such as `s3://bucket/run` or `memory://run`.

    Shards go straight under their final names: what makes them a checkpoint is the manifest beside them, the last
    object, created on the condition that there is none (S3's If-None-Match) and the first to go. Two starts of a run
    may so write into one folder: each touches only what bears its own number.
    """

    poll = 0.2
    renames = False

    def __init__(self, url: str) -> None:
        import fsspec  # type: ignore[import-untyped]

        try:
            filesystem, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"checkpoint.folder={url}: {error}") from error
        self.root, self.where = str(root).rstrip("/"), url.rstrip("/")
        self.filesystem: Any = _Plain(filesystem, self.where)
        protocol = filesystem.protocol
        self._has_folders = _BUCKETS.isdisjoint((protocol,) if isinstance(protocol, str) else protocol)

    def _path(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _names(self, path: str, kind: str) -> list[str]:
        self.filesystem.invalidate_cache()
        with suppress(FileNotFoundError):
            entries = self.filesystem.ls(path, detail=True)
            return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == kind)
        return []

    def folders(self) -> list[str]:
        found = self._names(self.root, "directory")
        bucket = self.root.lstrip("/").partition("/")[0]
        if not found and not self._has_folders and not self.filesystem.exists(bucket):
            raise CheckpointError(f"{self.where}: there is no bucket {bucket}")
        return found

    def leftovers(self) -> list[str]:
        found = []
        for folder in filter(STEP.fullmatch, self.folders()):
            names = self.files(folder)
            if FILE not in names and names and all(map(OURS.fullmatch, names)):
                found.append(folder)
        return sorted(found)

    def staging(self, step: int, generation: int) -> str:
        return step_folder(step)

    def begin(self, folder: str, generation: int) -> None:
        names = self.files(folder)
        if FILE in names:
            self.refuse_existing(_step(folder))
        newest = max((generation_of(name) or 0 for name in names), default=0)
        if newest > generation:
            raise CheckpointError(
                f"{self.where}/{folder}: start {newest} of the run writes there, this is {generation}"
            )
        for name in filter(OURS.fullmatch, names):
            self.remove_file(f"{folder}/{name}")
        if self._has_folders:
            self.filesystem.makedirs(self._path(folder), exist_ok=True)

    def write(self, path: str, chunks: Iterable[Buffer]) -> None:
        with _plainly(self.where):
            file = self.filesystem.open(self._path(path), "wb", block_size=2 * CHUNK)
            try:
                for chunk in chunks:
                    file.write(chunk)
            except BaseException:
                # Leaving a `with` block would complete the upload, and half a file would be an object.
                with suppress(Exception):
                    file.discard()
                with suppress(AttributeError):
                    file.closed = True
                self.remove_file(path)
                raise
            file.close()

    def put(self, path: str, content: bytes) -> None:
        self.filesystem.pipe_file(self._path(path), content)

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        if max_bytes is None:
            return self.filesystem.cat_file(self._path(path))
        content = self.filesystem.cat_file(self._path(path), start=0, end=max_bytes + 1)
        if len(content) > max_bytes:
            raise CheckpointError(f"{self.where}/{path}: longer than the {max_bytes} bytes it may have")
        return content

    def chunks(self, path: str) -> Iterator[Buffer]:
        size = self.size(path)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.where}/{path}")
        for start in range(0, size, CHUNK):
            yield self.filesystem.cat_file(self._path(path), start=start, end=min(size, start + CHUNK))

    def size(self, path: str) -> int | None:
        self.filesystem.invalidate_cache()
        with suppress(FileNotFoundError):
            entry = self.filesystem.info(self._path(path))
            return int(entry["size"]) if entry["type"] == "file" else None
        return None

    def files(self, folder: str) -> list[str]:
        return self._names(self._path(folder), "file")

    def _publish(self, staging: str, step: int, manifest: bytes) -> None:
        path = self._path(f"{staging}/{FILE}")
        try:
            self.filesystem.pipe_file(path, manifest, mode="create")
        except (NotImplementedError, TypeError, ValueError):  # a store that knows no such condition
            self.filesystem.pipe_file(path, manifest)
        except FileExistsError:
            self.refuse_existing(step)
            raise
        except OSError as error:
            if "PreconditionFailed" in repr(error) or "pre-conditions" in str(error):
                self.refuse_existing(step)
            raise

    def discard(self, staging: str, generation: int) -> None:
        # The staging folder is the checkpoint's own: whoever else writes that step, or has committed it meanwhile,
        # must lose nothing. What bears no number is left to the next start.
        names = self.files(staging)
        committed = self.manifest(_step(staging)).files if FILE in names else {}
        for name in names:
            if generation_of(name) == generation and name not in committed:
                self.remove_file(f"{staging}/{name}")

    def remove(self, folder: str) -> None:
        # Without its manifest it is no checkpoint any more, whatever is left.
        self.remove_file(f"{folder}/{FILE}")
        for name in self.files(folder):
            self.remove_file(f"{folder}/{name}")
        with suppress(FileNotFoundError, NotImplementedError, OSError):
            self.filesystem.rmdir(self._path(folder))  # memory:// has folders, s3:// has not

    def remove_file(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.rm_file(self._path(path))


class _Plain:
    """A file system whose own errors (no connection, no credentials) are OSErrors, as those of a disk are."""

    def __init__(self, filesystem: Any, where: str) -> None:
        self._filesystem, self._where = filesystem, where

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._filesystem, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with _plainly(self._where):
                return method(*arguments, **options)

        return call


@contextmanager
def _plainly(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, NotImplementedError):
        raise
    except Exception as error:
        raise OSError(f"{where}: {type(error).__name__}: {error}") from error


def _step(folder: str) -> int:
    return int(folder.rpartition("-")[2])
