"""Where checkpoints are kept, and what a whole one is: files, their hashes, their manifest, their seal."""

from __future__ import annotations

from pathlib import Path

from moe_dist.checkpoint.storage.base import CHUNK, Buffer, Storage, set_aside_name, step_folder
from moe_dist.checkpoint.storage.local import LocalStorage

__all__ = [
    "CHUNK",
    "Buffer",
    "LocalStorage",
    "Storage",
    "open_storage",
    "same_storage",
    "set_aside_name",
    "step_folder",
]


def same_storage(one: Storage, other: Storage) -> bool:
    """Whether both are the same folder, however it is written."""
    here, there = one.local_path("."), other.local_path(".")
    return one.where == other.where if here is None or there is None else here.resolve() == there.resolve()


def open_storage(location: str | Path) -> Storage:
    """The storage at a path or URL."""
    text = str(location)
    if "://" in text and not text.startswith("file://"):
        from moe_dist.checkpoint.storage.object import ObjectStorage  # only those who use it load what it needs

        return ObjectStorage(text)
    return LocalStorage(Path(text.removeprefix("file://")))
