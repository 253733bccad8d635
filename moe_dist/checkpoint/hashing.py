"""SHA-256 of files as they are written and as they are stored. Imports no torch.

SHA-256 rather than a faster hash: `sha256sum` is everywhere to check it by hand, and at 1.8 GB/s a core it is not what
a save waits for.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from moe_dist.checkpoint.manifest import FileEntry
from moe_dist.checkpoint.storage import Buffer, Storage

_AHEAD = 4
"""Chunks that may be written before they are hashed."""


def write_hashed(storage: Storage, path: str, chunks: Iterable[Buffer]) -> FileEntry:
    """Write a file and say how long it is and what its SHA-256 is, from the bytes in memory.

    Hashing goes on in a thread beside the writing: neither holds the interpreter's lock.
    """
    digest, count = hashlib.sha256(), 0
    hashed: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as beside:

        def passed() -> Iterator[Buffer]:
            nonlocal count
            for chunk in chunks:
                if len(hashed) == _AHEAD:  # no more chunks in memory than these
                    hashed.popleft().result()
                hashed.append(beside.submit(digest.update, chunk))
                count += len(chunk)
                yield chunk

        storage.write(path, passed())
    for last in hashed:
        last.result()
    return FileEntry(bytes=count, sha256=digest.hexdigest())


def hash_file(storage: Storage, path: str) -> str:
    """SHA-256 of a file as it is stored."""
    digest = hashlib.sha256()
    for chunk in storage.chunks(path):
        digest.update(chunk)
    return digest.hexdigest()
