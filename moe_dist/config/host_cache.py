"""What a host keeps of models that are elsewhere, and one process at a time that fetches it."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PATTERNS = ["*.safetensors", "*.json", "tokenizer.model", "spiece.model", "vocab.txt", "merges.txt", "*.jinja"]
"""Files that are fetched: weights, configuration, tokenizer. No code, and nothing pickled."""
WAITING = "another process of this host is fetching it"


def cache_folder() -> Path:
    """Where this host keeps what it has fetched: `moe-dist` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moe-dist"


@contextmanager
def one_at_a_time(what: str, waiting: Callable[[], None]) -> Iterator[bool]:
    """One process of this host is in here for the same thing. Gives whether another was before.

    `waiting` is called where this one has to wait.
    """
    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / hashlib.sha256(what.encode()).hexdigest()[:32], os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            waited = False
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            waited = True
        yield waited
    finally:
        os.close(descriptor)
