"""A model under our own names: safetensors files as anybody reads them, and a config.json that is the `model` section.

What no Hugging Face family can express leaves this way: a selection bias that is in use, a temperature, experts and
routers of classes of one's own, whose tensors are written by the names that they have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from moe_dist.checkpoint.reading import CheckpointRef
from moe_dist.checkpoint.shapes import MODEL, weight_source
from moe_dist.checkpoint.shards import TORCH_DTYPES
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import Manifest
from moe_dist.checkpoint.tools.inspecting import Tensors
from moe_dist.config import ConfigError, ModelConfig
from moe_dist.config.huggingface import MODEL_TYPE
from moe_dist.models.shapes import SELECTION_BIAS, logical_shapes
from moe_dist.pretrained.folder_weights import HEAD, finite, in_rows
from moe_dist.pretrained.source import Entry, SliceReader, in_one_line, read_headers

VERSION = 1
BLOCK_BYTES = 2**26
"""Values of a tensor that are in memory at once."""


def own_config(model: ModelConfig, temperature: float) -> dict[str, Any]:
    """The contents of its `config.json`. `temperature`: what router logits are divided by."""
    section = model.model_dump(mode="json", exclude={"from_pretrained"})
    return {"model_type": MODEL_TYPE, "version": VERSION, "router_temperature": temperature, "model": section}


def read_own_config(file: Path) -> tuple[ModelConfig, float]:
    """The model, and the temperature of its routers. Raises ConfigError."""
    try:
        values = json.loads(file.read_text("utf-8"))
        if values["model_type"] != MODEL_TYPE or values["version"] != VERSION:
            raise ValueError(f"model_type {values['model_type']}, version {values['version']}")
        return ModelConfig.model_validate(values["model"]), float(values["router_temperature"])
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{file}: model.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file}: not the configuration of a model of moe-dist: {error!r}") from error


class OwnWeights:
    """The weights of a checkpoint by our names, read in blocks of rows.

    `shapes`: of all of them, of tied embeddings without the head. `dtype`: of those that are numbers with a point;
    selection biases stay as they are saved, and so do whole numbers.
    """

    source = "as in the checkpoint"

    def __init__(
        self, found: CheckpointRef, manifest: Manifest, keys: Keys, config: ModelConfig, dtype: torch.dtype | None
    ) -> None:
        self.found, self.wanted_dtype = found, dtype
        self._tensors = Tensors(found, manifest, keys)
        names = [name.removeprefix(MODEL) for name in manifest.tensors if name.startswith(MODEL)]
        self._sources = {name: weight_source(name, manifest.tensors) for name in sorted(names, key=_in_order)}
        if config.tie_word_embeddings:
            self._sources.pop(HEAD, None)
        self.shapes = {name: manifest.tensors[source].shape for name, source in self._sources.items()}
        self._saved = {name: TORCH_DTYPES[manifest.tensors[source].dtype] for name, source in self._sources.items()}
        self.dtype = dtype or max((kind for kind in self._saved.values()), key=lambda kind: kind.is_floating_point)

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a tensor as it is written."""
        saved = self._saved[name]
        keeps = self.wanted_dtype is None or not saved.is_floating_point or name.endswith(SELECTION_BIAS)
        return saved if keeps else self.dtype

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The rows of a tensor, a part at a time. Raises ConfigError for values past what `dtype` holds."""
        shape, source = self.shapes[name], self._sources[name]
        for _, first, count in in_rows({name: shape}, BLOCK_BYTES, self._saved[name].itemsize):
            offset, size = ((first, *(0 for _ in shape[1:])), (count, *shape[1:])) if shape else ((), ())
            values = self._tensors.read_box(source, offset, size).to(self.dtype_of(name))
            if values.is_floating_point() and not torch.isfinite(values).all():
                raise ConfigError(f"{name}: a value that is not finite in {values.dtype}; --dtype fp32 holds more")
            yield values

    def close(self) -> None:
        """Let go of the open files."""
        self._tensors.close()


def _in_order(name: str) -> tuple[int, str]:
    """Embedding, layers by number, head."""
    parts = name.split(".")
    if parts[0] == "layers":
        return int(parts[1]), name
    return (-1 if parts[0].startswith("embed") else 2**31), name


class OwnFolderWeights:
    """Of a folder that `moe-dist export --to safetensors` has written, or somebody else in its form.

    No class that its configuration names is imported: of the tensors of such a class the files say names and shapes.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """Raises ValueError naming all that does not fit the model, before any value is read."""
        entries, problems, _, _ = read_headers(folder, lambda name: False, lambda name: name)
        expected = logical_shapes(config)
        own = [part for part in (".moe.experts.", ".moe.router.") if not any(part in name for name in expected)]
        for name, entry in entries.items():
            shape = tuple(entry.shape)
            is_own = any(part in name for part in own)
            if name not in expected and not (is_own and _is_in_block(name, config)):
                problems.append(f"{name}: not of this model ({entry.file})")
            elif name in expected and shape != expected[name]:
                problems.append(f"{name}: {list(shape)} instead of {list(expected[name])} ({entry.file})")
            elif entry.dtype not in TORCH_DTYPES:
                problems.append(f"{name}: type {entry.dtype}; {', '.join(TORCH_DTYPES)} are read ({entry.file})")
        if config.tie_word_embeddings:
            entries[HEAD] = entries.get("embed_tokens.weight", entries.get(HEAD))  # type: ignore[assignment]
        problems += [f"{name}: missing" for name in expected if entries.get(name) is None]
        if problems:
            raise ValueError(f"{folder}: {in_one_line(problems)}")
        self.folder, self._entries, self._reader = folder, entries, SliceReader(folder)
        self.shapes = expected | {name: tuple(entry.shape) for name, entry in entries.items()}
        self.files = sorted({entry.file for entry in entries.values()} | {"config.json"})

    def dtype_of(self, name: str) -> str:
        """As a checkpoint has it."""
        return _saved_as(self._entries[name])

    def read(self, name: str, first: int, count: int) -> Tensor:
        """As `FolderWeights.read`."""
        entry = self._entries[name]
        return finite(self._reader.read(entry, first, count), entry)


def _saved_as(entry: Entry) -> str:
    return "F32" if TORCH_DTYPES[entry.dtype].is_floating_point else entry.dtype


def _is_in_block(name: str, config: ModelConfig) -> bool:
    head, layer, _ = (*name.split(".", 2), "", "")[:3]
    return head == "layers" and layer.isdigit() and int(layer) in config.moe_layers
