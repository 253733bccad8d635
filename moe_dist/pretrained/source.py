"""A Hugging Face folder to read weights from: which file holds which tensor, and slices of them."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_dist.config import ModelConfig
from moe_dist.models.huggingface import (
    Part,
    fused_layers_of,
    is_no_weight,
    one_name,
    optional_names,
    parts,
    public_name,
)
from moe_dist.pretrained.safetensors_files import INDEX, SINGLE

DTYPES = ("F32", "BF16", "F16")
MAX_HEADER_BYTES = 100 * 2**20
"""As safetensors' own limit."""


class Entry(NamedTuple):
    """A tensor as a file's header has it. `name`: as in the file; `dtype`: safetensors' name."""

    name: str
    file: str
    dtype: str
    shape: list[int]


class Contents(NamedTuple):
    """All tensors of a folder, by their names in Qwen3-MoE's words; and what is wrong, each naming tensor or file."""

    tensors: dict[str, Entry]
    problems: list[str]

    def parts(self, config: ModelConfig) -> dict[str, Part]:
        """Every tensor that a model of this configuration has, in the layout of this folder."""
        return parts(config, fused_layers_of(self.tensors, config))


def read_contents(folder: Path, config: ModelConfig) -> Contents:
    """Read the headers of all files and hold them against the model. Reads no values.

    Raises ValueError where there are no safetensors files: pickled weights are not opened.
    """
    tensors: dict[str, Entry] = {}
    problems: list[str] = []
    unread: set[str] = set()
    files, index = _files(folder, problems)
    for file in files:
        try:
            header = read_header(folder / file)
        except (OSError, ValueError) as error:
            problems.append(f"{file}: {error}")
            unread.add(file)
            continue
        for name, (dtype, shape) in header.items():
            if is_no_weight(name):
                continue
            if index is not None and index.get(name) != file:
                problems.append(f"{name}: in {file}, in {INDEX} {index.get(name, 'not at all')}")
            key = one_name(name)
            if key in tensors:
                problems.append(f"{name}: twice, in {tensors[key].file} and in {file}")
            tensors[key] = Entry(name, file, dtype, shape)
    contents = Contents(tensors, problems)
    wanted, optional = contents.parts(config), optional_names(config)
    shown = {name: tensors[name].name if name in tensors else public_name(name, config) for name in wanted}
    lost = {one_name(name) for name, file in (index or {}).items() if file in unread}  # with their file, which is named
    if index is not None or not unread:
        missing = wanted.keys() - tensors.keys() - optional - lost
        problems += [f"{shown[name]}: missing" for name in wanted if name in missing]
    unexpected = [entry for name, entry in tensors.items() if name not in wanted]
    problems += [f"{entry.name}: not of this model ({entry.file})" for entry in unexpected]
    for name, part in wanted.items():
        entry = tensors.get(name)
        if entry is not None and tuple(entry.shape) != part.shape:
            problems.append(f"{shown[name]}: {entry.shape} instead of {list(part.shape)} ({entry.file})")
        if entry is not None and entry.dtype not in DTYPES:
            problems.append(f"{shown[name]}: type {entry.dtype}; {', '.join(DTYPES)} are read ({entry.file})")
    return contents


def _files(folder: Path, problems: list[str]) -> tuple[list[str], dict[str, str] | None]:
    """Names of the files, and which tensor is in which where an index says it."""
    if (folder / INDEX).exists():
        try:
            index = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
            if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
                raise ValueError("weight_map is no mapping of names to files")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{folder / INDEX}: cannot be read: {error}") from error
        plain = {file for file in index.values() if re.fullmatch(r"[\w.-]+\.safetensors", file)}
        problems += [f"{INDEX}: {file!r} is no safetensors file of this folder" for file in set(index.values()) - plain]
        return sorted(plain), index
    if (folder / SINGLE).exists():
        return [SINGLE], None
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder}: {pickled[0]} is pickled, and loading it would run what it says; convert it where you trust it: "
            "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('FOLDER')"
            ".save_pretrained('NEW')\""
        )
    raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX} is there")


def read_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape) of a safetensors file. Raises ValueError for one that is not whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"not a safetensors file: {size} bytes, a header of {length}")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_repeats)
        header.pop("__metadata__", None)
        found = {name: (str(entry["dtype"]), [int(n) for n in entry["shape"]]) for name, entry in header.items()}
        with safe_open(file, framework="pt"):  # checks the offsets against the types, the shapes and the file's length
            return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"damaged: {error}") from error


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


class SliceReader:
    """Slices of the tensors of a folder. Keeps one file open. `bytes_read`: of values, so far."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes_read = folder, 0
        self._name = ""
        self._file: Any = None

    def read(self, entry: Entry, first: int, count: int) -> Tensor:
        """Rows [first, first + count) of a tensor; only their bytes are read."""
        if self._name != entry.file:
            self._file, self._name = safe_open(self.folder / entry.file, framework="pt"), entry.file
        values: Tensor = self._file.get_slice(entry.name)[first : first + count]
        self.bytes_read += values.nbytes
        return values
