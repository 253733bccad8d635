"""BLAKE3 of files as they are written and as they are stored. Imports no torch.

BLAKE3 is as strong as SHA-256 and here four times as fast (4.2 against 1.0 GB/s on one core): a load that verifies
everything first waits for little else. `b3sum` checks a file by hand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from blake3 import blake3

from moe_dist.checkpoint.storage.base import Buffer, Storage
from moe_dist.checkpoint.storage.manifest import FileEntry

_AHEAD = 4
"""Chunks that may be written before they are hashed."""


def write_hashed(storage: Storage, path: str, chunks: Iterable[Buffer]) -> FileEntry:
    """Write a file and say how long it is and what its BLAKE3 is, from the bytes in memory.

    Hashing goes on in a thread beside the writing: neither holds the interpreter's lock.
    """
    digest, count = blake3(), 0
    hashed: deque[Future[object]] = deque()
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
    return FileEntry(bytes=count, blake3=digest.hexdigest())


def hash_file(storage: Storage, path: str) -> str:
    """BLAKE3 of a file as it is stored."""
    digest = blake3()
    for chunk in storage.chunks(path):
        digest.update(chunk)
    return digest.hexdigest()
