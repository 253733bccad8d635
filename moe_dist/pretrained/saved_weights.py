"""The weights of one of our checkpoints as Hugging Face has them, tensor by tensor, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_dist.checkpoint.reading import CheckpointRef
from moe_dist.checkpoint.shapes import weight_source
from moe_dist.checkpoint.shards import TORCH_DTYPES
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError, Manifest
from moe_dist.checkpoint.tools.inspecting import Tensors
from moe_dist.config import ConfigError, ModelConfig
from moe_dist.models.shapes import logical_shapes
from moe_dist.models.tensor_names import Names, Part, nonzero_bias


class SavedWeights:
    """Reads boxes of a checkpoint's weights; no process group, and in memory never more than one Hugging Face tensor.

    `parts`: what there is by public name, in the order of the files it is read from. `dtype`: of what is read; None:
    as saved.
    """

    source = "as in the checkpoint"

    def __init__(
        self, found: CheckpointRef, manifest: Manifest, keys: Keys, config: ModelConfig, dtype: torch.dtype | None
    ) -> None:
        """Raises ValueError where no Hugging Face family has what the run has."""
        self.config, self.found, self.names = config, found, Names(config)
        every = {name: part for name, part in self.names.parts().items() if name not in self.names.optional}
        self._tensors = Tensors(found, manifest, keys)
        self._sources = {part.ours: weight_source(part.ours, manifest.tensors) for part in every.values()}
        saved, self.parts = self._look_up(every)
        self.dtype = dtype if dtype is not None else saved
        self._refuse_selection_biases()
        self.shapes = {name: part.shape for name, part in self.parts.items()}

    def _look_up(self, every: dict[str, Part]) -> tuple[torch.dtype, dict[str, Part]]:
        """The widest type of what is saved, and the tensors in the order in which they are read best."""
        found, tensors = self.found, self._tensors.manifest.tensors
        missing = [source for source in self._sources.values() if source not in tensors]
        if missing:
            raise CheckpointError(f"{found}: it has no tensor {missing[0]} ({len(missing)} are missing)")
        entries = {ours: tensors[source] for ours, source in self._sources.items()}
        saved = {TORCH_DTYPES[entry.dtype] for entry in entries.values()}
        # A file of an object store or an encrypted one is fetched whole: each once, as far as tensors are not cut.
        order = sorted(every, key=lambda name: entries[every[name].ours].boxes[0].file)
        if all(len(entry.boxes) == 1 for entry in entries.values()):
            every = {name: every[name] for name in order}
        return max(saved, key=lambda kind: kind.itemsize), every

    def blocks(self, name: str) -> Iterator[Tensor]:
        """One: the whole tensor."""
        yield self.read(name)

    def read(self, name: str) -> Tensor:
        """One Hugging Face tensor by public name. Raises ConfigError where its values are past what `dtype` holds."""
        part = self.parts[name]
        return self._rounded(part.to_theirs(self._box(part.ours, part.offset, part.size)), name)

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a tensor by public name: `dtype`, but float32 for what the family keeps exact."""
        return torch.float32 if name.endswith(self.names.family.exact or (" ",)) else self.dtype

    def read_ours(self) -> dict[str, Tensor]:
        """All weights by our names, rounded to `dtype`, in float32: what a model of ours loads."""
        whole, shapes = {}, logical_shapes(self.config)
        for name, part in self.parts.items():
            if part.ours not in whole:
                shape = shapes[part.ours]
                whole[part.ours] = self._rounded(self._box(part.ours, (0,) * len(shape), shape), name).float()
        if self.config.tie_word_embeddings:
            whole["lm_head.weight"] = whole["embed_tokens.weight"]
        for name in self.names.biases:
            whole[name] = torch.zeros(self.config.num_experts)
        return whole

    def close(self) -> None:
        """Let go of the open files."""
        self._tensors.close()

    def _box(self, ours: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """Part of one of our weights, as saved."""
        return self._tensors.read_box(self._sources[ours], offset, size)

    def _rounded(self, values: Tensor, name: str) -> Tensor:
        rounded = values.to(dtype := self.dtype_of(name))
        if not torch.isfinite(torch.stack(torch.aminmax(rounded))).all():
            raise ConfigError(f"{name}: a value that is not finite in {dtype}; --dtype fp32 holds more")
        return rounded

    def _refuse_selection_biases(self) -> None:
        for name in self.names.biases:
            source = weight_source(name, self._tensors.manifest.tensors)
            if source in self._tensors.manifest.tensors and self._tensors.read(source).count_nonzero() > 0:
                raise ValueError(nonzero_bias(name, self.names.family))
