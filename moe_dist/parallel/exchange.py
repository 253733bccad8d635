"""Values between ranks, without pickle: JSON, with the bytes of tensors behind it.

What arrives can only become numbers, text, lists, tuples, sets, dicts, paths, tensors, and plain records of this
package. Nothing that a peer, or somebody between the ranks, sends is executed.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import PosixPath
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_PACKAGES = ("moe_dist", "launcher")
"""Whose records travel: dataclasses and named tuples."""
_TAG = "!"
_HEAD = struct.Struct(">Q")  # bytes of JSON that follow
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def gather(value: Any, group: ProcessGroup | None, device: torch.device) -> list[Any]:
    """What every rank of `group` (None: of the world) has, in order of rank, on every rank (collective)."""
    mine = encode(value).to(device)
    count = dist.get_world_size(group)
    sizes = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(count)]
    dist.all_gather(sizes, torch.tensor([mine.numel()], device=device), group=group)
    lengths = [int(size) for size in sizes]
    padded = mine.new_zeros(max(lengths))
    padded[: mine.numel()] = mine
    parts = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(parts, padded, group=group)
    return [decode(part[:length].cpu()) for part, length in zip(parts, lengths, strict=True)]


def broadcast(value: Any, device: torch.device) -> Any:
    """`value` as rank 0 of the world has it, on every rank (collective). Rank 0 gets its own object back."""
    first = dist.get_rank() == 0
    message = encode(value).to(device) if first else torch.empty(0, dtype=torch.uint8, device=device)
    size = torch.tensor([message.numel()], device=device)
    dist.broadcast(size, src=0)
    if not first:
        message = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(message, src=0)
    return value if first else decode(message.cpu())


def encode(value: Any) -> Tensor:
    """`value` as bytes (uint8, on the CPU). Raises TypeError naming the type that cannot travel."""
    tensors: list[Tensor] = []
    text = json.dumps(_plain(value, tensors), separators=(",", ":")).encode()
    head = torch.frombuffer(bytearray(_HEAD.pack(len(text)) + text), dtype=torch.uint8)
    return torch.cat([head, *(tensor.view(torch.uint8) for tensor in tensors)])


def decode(message: Tensor) -> Any:
    """What `encode` was given; tensors are on the CPU. Raises ValueError for anything else."""
    try:
        (length,) = _HEAD.unpack(message[: _HEAD.size].numpy().tobytes())
        start = _HEAD.size + length
        if start > message.numel():
            raise ValueError(f"{message.numel()} bytes of {start}")
        tree = json.loads(message[_HEAD.size : start].numpy().tobytes())
        return _built(tree, _Bytes(message[start:]))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError, struct.error) as error:
        raise ValueError(f"another rank sent what cannot be read: {type(error).__name__}: {error}") from None


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    """As JSON; tensors are collected, in the order in which their bytes follow."""
    kind = type(value)
    if kind in (str, int, float, bool) or value is None:
        return value
    if kind is list:
        return [_plain(item, tensors) for item in value]
    if kind is dict and all(type(key) is str for key in value) and _TAG not in value:
        return {key: _plain(item, tensors) for key, item in value.items()}
    if isinstance(value, Tensor):
        if str(value.dtype).removeprefix("torch.") not in _DTYPES:
            raise TypeError(f"a tensor of {value.dtype} cannot be sent to other ranks")
        tensors.append(value.detach().cpu().contiguous().reshape(-1))
        return {_TAG: "tensor", "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if kind is dict:
        return {_TAG: "dict", "items": [[_plain(one, tensors) for one in pair] for pair in value.items()]}
    if kind in (tuple, torch.Size):
        return {_TAG: "tuple", "items": [_plain(item, tensors) for item in value]}
    if kind in (set, frozenset):
        return {_TAG: kind.__name__, "items": [_plain(item, tensors) for item in value]}
    if kind is PosixPath:
        return {_TAG: "path", "items": str(value)}
    name = f"{kind.__module__}:{kind.__qualname__}"
    if _record(name) is kind:
        names = _fields(kind)
        return {_TAG: name, "items": [_plain(getattr(value, field), tensors) for field in names]}
    raise TypeError(f"a {name} cannot be sent to other ranks")


class _Bytes:
    """The bytes behind the JSON, taken in order."""

    def __init__(self, left: Tensor) -> None:
        self._left = left

    def take(self, dtype: torch.dtype, shape: list[int]) -> Tensor:
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"a shape of {shape}")
        found = torch.Size(shape)
        size = found.numel() * dtype.itemsize
        if size > self._left.numel():
            raise ValueError(f"{self._left.numel()} bytes for {size}")
        part, self._left = self._left[:size], self._left[size:]
        return part.clone().view(dtype).reshape(found)


def _built(tree: Any, data: _Bytes) -> Any:
    if isinstance(tree, list):
        return [_built(item, data) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TAG not in tree:
        return {key: _built(item, data) for key, item in tree.items()}
    kind = tree[_TAG]
    if kind == "tensor":
        return data.take(_DTYPES[tree["dtype"]], tree["shape"])
    if kind == "path":
        return PosixPath(tree["items"])
    items = [_built(item, data) for item in tree["items"]]
    if kind in _MADE:
        return _MADE[kind](items)
    record = _record(kind)
    if record is None or len(items) != len(_fields(record)):
        raise ValueError(f"a {kind}")
    if issubclass(record, tuple):
        return tuple.__new__(record, items)
    made = object.__new__(record)
    for name, item in zip(_fields(record), items, strict=True):  # none of its code runs
        object.__setattr__(made, name, item)
    return made


_MADE: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}


def _record(name: str) -> type | None:
    """The dataclass or named tuple `module:Class` of this package; None for everything else. Imports nothing."""
    module, _, path = name.partition(":")
    found = sys.modules.get(module) if module.partition(".")[0] in _PACKAGES else None
    kind = vars(found).get(path) if found is not None else None
    if not isinstance(kind, type) or kind.__module__ != module:
        return None
    return kind if is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields")) else None


def _fields(kind: type) -> list[str]:
    return [field.name for field in fields(kind)] if is_dataclass(kind) else list(kind._fields)  # type: ignore[attr-defined]


Failure = tuple[str, list[Any]]
"""(name of the type, its arguments) of an error on its way to other ranks."""


def as_failure(error: ValueError | OSError) -> Failure:
    """An error of this package or of the system as it is, any other as a ValueError or OSError of the same text."""
    if isinstance(error, OSError):
        if error.errno is None or error.strerror is None:
            return "OSError", [str(error)]
        return "OSError", [error.errno, error.strerror, *([str(error.filename)] if error.filename else [])]
    name = f"{type(error).__module__}:{type(error).__qualname__}"
    return name if _error(name) else "ValueError", [str(error)]


def as_error(failure: Failure) -> ValueError | OSError:
    """What `as_failure` was given, or what stands for it."""
    name, arguments = failure
    if name == "OSError":
        return OSError(*arguments)
    return ValueError.__new__(_error(name) or ValueError, *arguments)  # none of its code runs


def _error(name: str) -> type[ValueError] | None:
    """A kind of ValueError of this package."""
    module, _, path = name.partition(":")
    found = sys.modules.get(module) if module.partition(".")[0] in _PACKAGES else None
    kind = vars(found).get(path) if found is not None else None
    return kind if isinstance(kind, type) and issubclass(kind, ValueError) else None
