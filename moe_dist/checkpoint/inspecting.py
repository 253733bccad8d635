"""Look into a checkpoint without a model: whole tensors, their hashes, and those of every expert."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.checkpoint.encryption import Keys
from moe_dist.checkpoint.manifest import Manifest, TensorEntry
from moe_dist.checkpoint.reading import Found
from moe_dist.checkpoint.shards import TORCH_DTYPES, ShardReader


class Entry(NamedTuple):
    """A logical tensor, or one expert's part of a stack. `norm`: L2; `sha256`: of the values, whatever the layout."""

    name: str
    expert: int | None
    shape: tuple[int, ...]
    dtype: str
    norm: float
    sha256: str


def is_stack(name: str, entry: TensorEntry) -> bool:
    """Whether dimension 0 counts experts."""
    return ".experts." in name and ".experts.experts." not in name and len(entry.shape) == 3


def tensors(found: Found, manifest: Manifest, keys: Keys) -> Iterator[tuple[str, Tensor]]:
    """Every logical tensor put together from its boxes, one at a time."""
    seal = keys.opening(manifest, str(found))
    reader = ShardReader(found.storage, found.folder, seal and seal.open)
    for name, entry in sorted(manifest.tensors.items(), key=lambda item: (item[1].boxes[0].file, item[0])):
        whole = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        for box in entry.boxes:
            place = tuple(slice(start, start + size) for start, size in zip(box.offset, box.shape, strict=True))
            whole[place] = reader.read(name, entry, box)
        yield name, whole
    reader.close()


def entries(found: Found, manifest: Manifest, keys: Keys) -> Iterator[Entry]:
    """Shape, norm and hash of every logical tensor; a stack of experts gives one entry per expert."""
    for name, whole in tensors(found, manifest, keys):
        entry = manifest.tensors[name]
        if is_stack(name, entry):
            for expert, part in enumerate(whole.unbind(0)):
                yield _entry(name, expert, part, entry.dtype)
        else:
            yield _entry(name, None, whole, entry.dtype)


def digests(found: Found, keys: Keys | None = None) -> dict[str, str]:
    """SHA-256 of every logical tensor and expert by name: equal for equal values, whatever layout wrote them."""
    listed = entries(found, found.storage.manifest(found.step), keys or Keys())
    return {
        f"{entry.name}[{entry.expert}]" if entry.expert is not None else entry.name: entry.sha256 for entry in listed
    }


def _entry(name: str, expert: int | None, values: Tensor, dtype: str) -> Entry:
    values = values.contiguous()
    digest = hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().data)
    norm = float(values.double().norm()) if values.numel() else 0.0
    return Entry(name, expert, tuple(values.shape), dtype, norm, digest.hexdigest())
