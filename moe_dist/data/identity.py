"""Whether data is the data it was: by a hash of all tokens where they are in memory, and named by file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_dist.data.packing import PackedDataset

_BLOCK, _BLOCKS = 16384, 4
_MOST_FILES = 20_000
"""Of more than these only one mark for all is kept."""
_MOST_NAMES = 3


def identity(dataset: object, files: Sequence[tuple[str, str]], num_samples: int | None = None) -> dict[str, Any]:
    """What `difference` compares: `tokens`, a hash of all tokens, document borders and labels (of the first
    `num_samples` samples), None of a stream; `files`, a mark of each file by its id, in the order they are read."""
    tokens = _hash_of(dataset, num_samples) if isinstance(dataset, PackedDataset) else None
    marks = {id_: _mark(path) for id_, path in files}
    if len(marks) > _MOST_FILES:
        marks = {f"{len(marks)} files": hashlib.sha256(repr(list(marks.items())).encode()).hexdigest()}
    return {"tokens": tokens, "files": marks}


def difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In what two identities differ, in words that name files; None when the data is the same, or nobody can tell."""
    if None not in (saved["tokens"], now["tokens"]):
        if saved["tokens"] == now["tokens"]:
            return None  # whatever the files are called now
    elif list(saved["files"].items()) == list(now["files"].items()):
        return None
    before, after = saved["files"], now["files"]
    kinds = (
        ("changed", [name for name in after if name in before and before[name] != after[name]]),
        ("missing", [name for name in before if name not in after]),
        ("new", [name for name in after if name not in before]),
    )
    words = [f"{_names(names)} {'is' if len(names) == 1 else 'are'} {kind}" for kind, names in kinds if names]
    if words:
        return "; ".join(words)
    if list(before) != list(after):
        return "the same files come in another order"
    return "the same files give other tokens" if before else "the texts are others"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _hash_of(dataset: PackedDataset, num_samples: int | None) -> str:
    from blake3 import blake3

    end = len(dataset.tokens) if num_samples is None else dataset.end_of(num_samples)
    digest = blake3(max_threads=blake3.AUTO)
    starts = dataset.document_starts
    for part in (dataset.tokens[:end], starts[starts < end], None if dataset.labels is None else dataset.labels[:end]):
        if part is not None:
            digest.update(f"{part.dtype} {len(part)}\n".encode())
            digest.update(part.view(np.uint8).data if len(part) else b"")
    return digest.hexdigest()


def _mark(path: str) -> str:
    """A hash of a file's size and of blocks all over it: the same on every machine, and quick for any size."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(str(size).encode())
            for number in range(_BLOCKS):
                file.seek(number * max(_BLOCK, (size - _BLOCK) // (_BLOCKS - 1)))
                digest.update(file.read(_BLOCK))
    except OSError:
        return "unreadable"
    return digest.hexdigest()
