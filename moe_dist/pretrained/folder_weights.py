"""The weights of a folder under our names, read in boxes of rows: no tensor is ever whole in memory.

Rows are dimension 0: of a stack, its experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe_dist.config import ConfigError, ModelConfig
from moe_dist.config.families import families
from moe_dist.models.shapes import Shapes, logical_shapes
from moe_dist.models.tensor_names import Names, Part, untied_head
from moe_dist.pretrained.source import Entry, SliceReader, in_one_line, read_folder

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


class FolderWeights(Protocol):
    """What is imported. `shapes`: of every weight and buffer by our name. `files`: what it is read from."""

    folder: Path
    shapes: Shapes
    files: list[str]

    def dtype_of(self, name: str) -> str:
        """As a checkpoint has it, by safetensors' name."""

    def read(self, name: str, first: int, count: int) -> Tensor:
        """Rows [first, first + count) of a weight, in the type of the file.

        Raises ConfigError for what is not finite.
        """


class Rows(NamedTuple):
    """Rows [first, first + num_rows) of a weight of ours."""

    name: str
    first: int
    num_rows: int


def in_rows(shapes: Shapes, max_bytes: int, itemsize: int = 4) -> Iterator[Rows]:
    """All weights, in boxes of at most `max_bytes`; one row at least."""
    for name, shape in shapes.items():
        if not shape:
            yield Rows(name, 0, 1)
            continue
        row = itemsize * torch.Size(shape[1:]).numel()
        step = max(1, max_bytes // max(1, row))
        for first in range(0, shape[0], step):
            yield Rows(name, first, min(step, shape[0] - first))


class HuggingFaceWeights:
    """Of a Hugging Face folder, in either layout of its experts."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """Raises ValueError naming all that does not fit the model: from the headers, before any value is read."""
        contents = read_folder(folder, config)
        if contents.problems:
            raise ValueError(f"{folder}: {in_one_line(contents.problems)}")
        names = Names(config, families()[contents.family])
        self.folder, self.files, self.shapes = folder, contents.files, logical_shapes(config)
        self._biases, self._reader = set(names.biases), SliceReader(folder)
        self._parts: dict[str, list[tuple[Part, Entry]]] = {}
        for name, part in contents.parts(names).items():
            if name in contents.tensors:
                self._parts.setdefault(part.ours, []).append((part, contents.tensors[name]))
        if config.tie_word_embeddings:
            self._tie()

    def _tie(self) -> None:
        """A head that is there must be the embedding, which stands for it where it is not."""
        if HEAD in self._parts:
            for rows in in_rows({EMBEDDING: self.shapes[EMBEDDING]}, 2**26):
                if not torch.equal(self.read(*rows), self.read(HEAD, rows.first, rows.num_rows)):
                    raise ValueError(f"{self.folder}: {untied_head()}")
        else:
            self._parts[HEAD] = self._parts[EMBEDDING]

    def entry(self, name: str) -> Entry:
        """Where a weight of ours lies, or the first of its parts."""
        return self._parts[name][0][1]

    def dtype_of(self, name: str) -> str:
        """Float32 whatever the file has: full precision, as a trainer saves."""
        return "F32"

    def read(self, name: str, first: int, count: int) -> Tensor:
        """As `FolderWeights.read`. A selection bias that the family has no place for is zero."""
        size = (count, *self.shapes[name][1:])
        if name in self._biases:
            return torch.zeros(size)
        found: Tensor | None = None
        for part, entry in self._parts[name]:
            if (cut := part.of_experts(first, count)) is None:
                continue
            mine, start = cut
            is_stack = len(mine.shape) == len(mine.size)
            values = finite(self._reader.read(entry, start if is_stack else 0, mine.shape[0]), entry)
            if found is None:
                found = values.new_empty(size)
            offset = (mine.offset[0] - first, *mine.offset[1:])
            found[tuple(slice(o, o + n) for o, n in zip(offset, mine.size, strict=True))] = mine.to_ours(values)
        assert found is not None
        return found


def finite(values: Tensor, entry: Entry) -> Tensor:
    """The values themselves. Raises ConfigError naming tensor and file where one is not finite."""
    if values.is_floating_point() and values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        raise ConfigError(f"{entry.name}: a value that is not finite ({entry.file})")
    return values
