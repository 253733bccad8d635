"""Look into checkpoints without a model: whole tensors, their hashes, those of every expert, and differences."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.checkpoint.reading import CheckpointRef
from moe_dist.checkpoint.shards import TORCH_DTYPES, ShardReader
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import Manifest, TensorEntry


class Entry(NamedTuple):
    """A logical tensor, or one expert's part of a stack. `norm`: L2; `sha256`: of the values, whatever the layout."""

    name: str
    expert: int | None
    shape: tuple[int, ...]
    dtype: str
    norm: float
    sha256: str


class Difference(NamedTuple):
    """A tensor, or one expert of a stack, that two checkpoints do not have alike.

    `relative`: L2 of the difference over L2 of the first; None when they cannot be subtracted, for `reason`.
    """

    name: str
    expert: int | None
    relative: float | None
    reason: str | None


def is_stack(name: str, entry: TensorEntry) -> bool:
    """Whether dimension 0 counts experts."""
    return ".experts." in name and ".experts.experts." not in name and bool(entry.shape)


class Tensors:
    """The logical tensors of one checkpoint by name, put together from their boxes. Keeps one file open."""

    def __init__(self, found: CheckpointRef, manifest: Manifest, keys: Keys) -> None:
        """Raises CheckpointError when it is sealed and the key is missing."""
        self.found, self.manifest = found, manifest
        seal = keys.opening(manifest, str(found))
        self._reader = ShardReader(found.storage, found.folder, seal and seal.open)

    def names(self) -> list[str]:
        """All names, those of one file together."""
        items = self.manifest.tensors.items()
        return [name for name, entry in sorted(items, key=lambda item: (item[1].boxes[0].file, item[0]))]

    def read(self, name: str) -> Tensor:
        """A whole tensor. Raises CheckpointError naming file and tensor."""
        entry = self.manifest.tensors[name]
        return self.read_box(name, (0,) * len(entry.shape), entry.shape)

    def read_box(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Part of a tensor, out of all the boxes that meet it."""
        entry = self.manifest.tensors[name]
        values = torch.empty(shape, dtype=TORCH_DTYPES[entry.dtype])
        for box in entry.boxes:
            starts = [max(a, b) for a, b in zip(offset, box.offset, strict=True)]
            ends = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, box.offset, box.shape, strict=True)]
            if any(start >= end for start, end in zip(starts, ends, strict=True)):
                continue
            there = tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, offset, strict=True))
            part = [slice(s - o, e - o) for s, e, o in zip(starts, ends, box.offset, strict=True)]
            is_whole = all(p.stop - p.start == size for p, size in zip(part, box.shape, strict=True))
            values[there] = self._reader.read(name, entry, box, None if is_whole else part)
        return values

    def close(self) -> None:
        """Let go of the open file."""
        self._reader.close()


def tensors(found: CheckpointRef, manifest: Manifest, keys: Keys) -> Iterator[tuple[str, Tensor]]:
    """Every logical tensor, one at a time."""
    source = Tensors(found, manifest, keys)
    for name in source.names():
        yield name, source.read(name)
    source.close()


def entries(found: CheckpointRef, manifest: Manifest, keys: Keys) -> Iterator[Entry]:
    """Shape, norm and hash of every logical tensor; a stack of experts gives one entry per expert."""
    for name, whole in tensors(found, manifest, keys):
        entry = manifest.tensors[name]
        if is_stack(name, entry):
            for expert, part in enumerate(whole.unbind(0)):
                yield _entry(name, expert, part, entry.dtype)
        else:
            yield _entry(name, None, whole, entry.dtype)


def digests(found: CheckpointRef, keys: Keys | None = None) -> dict[str, str]:
    """SHA-256 of every logical tensor and expert by name: equal for equal values, whatever layout wrote them."""
    listed = entries(found, found.storage.manifest(found.step), keys or Keys())
    return {
        f"{entry.name}[{entry.expert}]" if entry.expert is not None else entry.name: entry.sha256 for entry in listed
    }


def differences(one: Tensors, other: Tensors) -> Iterator[Difference]:
    """What is not bitwise alike, a stack of experts expert by expert."""
    mine, theirs = one.manifest.tensors, other.manifest.tensors
    for name in one.names():
        entry, second = mine[name], theirs.get(name)
        if second is None:
            yield Difference(name, None, None, "only in the first")
        elif (entry.shape, entry.dtype) != (second.shape, second.dtype):
            text = f"{entry.dtype} {list(entry.shape)}, in the second {second.dtype} {list(second.shape)}"
            yield Difference(name, None, None, text)
        else:
            a, b = one.read(name), other.read(name)
            pairs = enumerate(zip(a, b, strict=True)) if is_stack(name, entry) else [(None, (a, b))]
            for expert, (left, right) in pairs:
                if not torch.equal(_bytes(left), _bytes(right)):
                    yield Difference(name, expert, _relative(left, right), None)
    for name in other.names():
        if name not in mine:
            yield Difference(name, None, None, "only in the second")


def _relative(left: Tensor, right: Tensor) -> float:
    before = float(left.double().norm())
    moved = float((right.double() - left.double()).norm())
    return moved / before if before else float("inf") if moved else 0.0


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().reshape(-1).view(torch.uint8)


def _entry(name: str, expert: int | None, values: Tensor, dtype: str) -> Entry:
    digest = hashlib.sha256(_bytes(values).numpy().data)
    norm = float(values.double().norm()) if values.numel() else 0.0
    return Entry(name, expert, tuple(values.shape), dtype, norm, digest.hexdigest())
