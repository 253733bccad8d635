"""A Hugging Face folder to read weights from: which file holds which tensor, and slices of them. Imports no torch."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from moe_dist.config import ModelConfig
from moe_dist.config.huggingface import architecture_differences, model_of, pretrained_config
from moe_dist.models.tensor_names import Names, Part

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": 4, "BF16": 2, "F16": 2}
"""Types that are read, and their bytes."""
MAX_HEADER_BYTES = 100 * 2**20
"""As safetensors' own limit."""


class Entry(NamedTuple):
    """A tensor as a file's header has it. `name`: as in the file; `dtype`: safetensors' name; `start`: first byte."""

    name: str
    file: str
    dtype: str
    shape: list[int]
    start: int


class Piece(NamedTuple):
    """What a rank reads of one tensor: rows [first, first + num_rows), which are `part` of ours."""

    entry: Entry
    first: int
    num_rows: int
    part: Part

    @property
    def byte_range(self) -> tuple[int, int]:
        """In the file, end past the last."""
        row = prod(self.entry.shape[1:]) * DTYPES[self.entry.dtype]
        start = self.entry.start + self.first * row
        return start, start + self.num_rows * row


WHOLE = range(0)
Held = Callable[[str], range | None]
"""One of our names -> which experts of that stack a rank holds; WHOLE for what is no stack; None: nothing of it."""


class Contents(NamedTuple):
    """All tensors of a folder by public name, and what is wrong, each naming tensor or file.

    `family`: whose model_type it is.
    """

    family: str
    tensors: dict[str, Entry]
    problems: list[str]

    @property
    def files(self) -> list[str]:
        """Names of all that the model is read from."""
        return sorted({entry.file for entry in self.tensors.values()} | {"config.json"})

    def parts(self, names: Names) -> dict[str, Part]:
        """Every tensor that the model has, in the layout of this folder."""
        return names.parts(names.fused_layers(self.tensors))


def read_folder(folder: Path, config: ModelConfig) -> Contents:
    """Its headers, held against the run's model.

    Raises ValueError when the folder's model is another, or has no weights that can be read.
    """
    said = f"model.from_pretrained={folder}"
    found = pretrained_config(folder, said)
    if wrong := architecture_differences(config, model_of(found)):
        raise ValueError(f"{said}: the run's model is another: {', '.join(wrong)}")
    return read_contents(folder, Names(config, found.family))


def in_one_line(problems: list[str]) -> str:
    """All of them, or the first 20 and how many more."""
    more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
    return "; ".join(problems[:20]) + more


def read_contents(folder: Path, names: Names) -> Contents:
    """Read the headers of all files and hold them against the model. Reads no values.

    Raises ValueError where there are no safetensors files: pickled weights are not opened.
    """
    tensors, problems, index, unread = read_headers(folder, names.ignores, names.public)
    contents = Contents(names.family.model_type, tensors, problems)
    wanted, optional = contents.parts(names), names.optional
    shown = {name: tensors[name].name if name in tensors else name for name in wanted}
    lost = {
        names.public(name) for name, file in (index or {}).items() if file in unread
    }  # with their file, which is named
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


def read_headers(
    folder: Path, ignores: Callable[[str], bool], public: Callable[[str], str]
) -> tuple[dict[str, Entry], list[str], dict[str, str] | None, set[str]]:
    """All tensors by public name, what is wrong, the index where there is one, and files that could not be read.

    Raises ValueError where there are no safetensors files.
    """
    tensors: dict[str, Entry] = {}
    problems: list[str] = []
    unread: set[str] = set()
    files, index = _files(folder, problems)
    for file in files:
        if (target := leads_out(folder, file)) is not None:
            problems.append(f"{file}: a link out of the folder, to {target}")
            unread.add(file)
            continue
        try:
            header = read_header(folder / file)
        except (OSError, ValueError) as error:
            problems.append(f"{file}: {error}")
            unread.add(file)
            continue
        for name, (dtype, shape, start) in header.items():
            if ignores(name):
                continue
            if index is not None and index.get(name) != file:
                problems.append(f"{name}: in {file}, in {INDEX} {index.get(name, 'not at all')}")
            key = public(name)
            if key in tensors:
                problems.append(f"{name}: twice, in {tensors[key].file} and in {file}")
            tensors[key] = Entry(name, file, dtype, shape, start)
    return tensors, problems, index, unread


def leads_out(folder: Path, file: str) -> Path | None:
    """Where a file of the folder really lies, if that is neither in it nor with the blobs of the hub's cache."""
    root, target = folder.resolve(), (folder / file).resolve()
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    return None if any(target.is_relative_to(home) for home in homes) else target


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


def readable(contents: Contents, names: Names) -> list[tuple[Entry, Part]]:
    """Every tensor that the model has, and what it is of ours, in the order of files, so that each is opened once.

    What the folder has not, or has in another shape, is left out.
    """
    found = [
        (entry, part)
        for name, part in contents.parts(names).items()
        if (entry := contents.tensors.get(name)) is not None
        and tuple(entry.shape) == part.shape
        and entry.dtype in DTYPES
    ]
    return sorted(found, key=lambda pair: (pair[0].file, pair[0].start))


def pieces(tensors: Iterable[tuple[Entry, Part]], held: Held) -> Iterator[Piece]:
    """What a rank reads of these."""
    for entry, part in tensors:
        experts = held(part.ours)
        if experts is None:
            continue
        if experts == WHOLE:
            yield Piece(entry, 0, part.shape[0], part)
        elif (cut := part.of_experts(experts.start, len(experts))) is not None:
            mine, first = cut
            is_stack = len(mine.shape) == len(mine.size)
            yield Piece(entry, first if is_stack else 0, mine.shape[0], mine)


def read_header(file: Path) -> dict[str, tuple[str, list[int], int]]:
    """Name -> (dtype, shape, first byte) of a safetensors file. Raises ValueError for one that is not whole."""
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
        found = {
            name: (str(entry["dtype"]), [int(n) for n in entry["shape"]], 8 + length + int(entry["data_offsets"][0]))
            for name, entry in header.items()
        }
        with safe_open(
            file, framework="numpy"
        ):  # checks the offsets against the types, the shapes and the file's length
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
        values: Tensor
        if entry.shape:
            values = self._file.get_slice(entry.name)[first : first + count]
        else:
            values = self._file.get_tensor(entry.name)
        self.bytes_read += values.nbytes
        return values
