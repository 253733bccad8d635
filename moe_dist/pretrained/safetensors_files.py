"""Safetensors files of a Hugging Face folder, written one tensor at a time: no file is ever whole in memory.

Format: 8 bytes little-endian length, a JSON header, the values (huggingface/safetensors, README "Format").
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moe_dist.checkpoint.shards import NAMES
from moe_dist.pretrained.source import INDEX, SINGLE


class Planned(NamedTuple):
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Weights(Protocol):
    """What a folder is made of: tensors by public name, each read or made when asked for, the same each time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By name, in the order in which they are best read."""

    def dtype_of(self, name: str) -> torch.dtype:
        """As it is written."""

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor, its rows a part at a time, each contiguous."""


def write_weights(folder: Path, weights: Weights, max_bytes: int) -> dict[str, list[Planned]]:
    """Write all tensors into files of at most `max_bytes`, and the index of several. Returns file name -> tensors."""
    files = plan_files(
        [Planned(name, shape, weights.dtype_of(name)) for name, shape in weights.shapes.items()], max_bytes
    )
    for name, tensors in files.items():
        write_file(folder / name, tensors, weights.blocks)
    write_index(folder, files)
    return files


def write_json(path: Path, values: dict[str, Any]) -> None:
    """One of the folder's small files."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def plan_files(tensors: Sequence[Planned], max_bytes: int) -> dict[str, list[Planned]]:
    """File name -> its tensors, in their order; a file is over `max_bytes` only when it holds one tensor alone."""
    files: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.num_bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.num_bytes
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{number:05d}-of-{len(files):05d}.safetensors": part for number, part in enumerate(files, 1)}


def write_file(path: Path, tensors: Sequence[Planned], blocks: Callable[[str], Iterable[Tensor]]) -> None:
    """Write one file and flush it to the disk. `blocks` gives a tensor as it was planned, in contiguous parts."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.num_bytes]
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            written = 0
            for values in blocks(tensor.name):
                assert (values.shape[1:], values.dtype) == (tensor.shape[1:], tensor.dtype), tensor.name
                written += file.write(values.reshape(-1).view(torch.uint8).numpy().data)
            assert written == tensor.num_bytes, tensor.name
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: Path, files: dict[str, list[Planned]]) -> None:
    """Which file holds which tensor; only where there are several files."""
    if len(files) == 1:
        return
    total = sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)
    weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
