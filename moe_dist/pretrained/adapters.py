"""Adapters into a model, out of a checkpoint, and added to the weights of the model that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.reading import CheckpointRef
from moe_dist.checkpoint.shapes import MODEL, has_adapters_alone
from moe_dist.checkpoint.shards import TORCH_DTYPES
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError, Manifest
from moe_dist.checkpoint.tools.inspecting import Tensors
from moe_dist.config import Config, ConfigError, LoraConfig
from moe_dist.models.adapter_shapes import Target, adapter_shapes, targets
from moe_dist.models.layers import DecomposedLowRank, Linear
from moe_dist.models.shapes import logical_shapes
from moe_dist.models.tensor_names import Part
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.pretrained.folder_weights import HuggingFaceWeights
from moe_dist.pretrained.loading import held_by
from moe_dist.pretrained.peft_format import read_adapter
from moe_dist.pretrained.provenance import sha256_of
from moe_dist.pretrained.saved_weights import SavedWeights
from moe_dist.pretrained.source import WHOLE


@torch.no_grad()
def load_adapter(model: Transformer, config: Config, mesh: Mesh) -> None:
    """First values of the adapters from `lora.from_adapter`, a PEFT folder, into this rank's part of the model.

    It has its weights, and is not sharded yet. A collective; raises ConfigError on every rank.
    """
    folder = Path(str(config.lora.from_adapter))
    mesh.ask_rank_zero(lambda: bool(read_adapter(folder, config.model, config.lora)))
    weights = read_adapter(folder, config.model, config.lora)
    held = held_by(model)
    for name, parameter in model.named_parameters():
        if name in weights:
            experts = held(name) or WHOLE
            whole = weights[name]
            parameter.copy_(whole if experts == WHOLE else whole[experts.start : experts.stop])
    for module in model.modules():
        if isinstance(module, Linear) and isinstance(module.lora, DecomposedLowRank):
            module.lora.magnitude.sub_(module.lora.lengths(module.weight)[0])  # PEFT has whole lengths of rows


def saved_adapter(found: CheckpointRef, manifest: Manifest, keys: Keys, config: Config) -> dict[str, Tensor]:
    """The adapters of a checkpoint by our names, whole. Raises CheckpointError where one is missing."""
    tensors = Tensors(found, manifest, keys)
    names = list(adapter_shapes(config.model, config.lora))
    if missing := [name for name in names if f"{MODEL}{name}" not in manifest.tensors]:
        raise CheckpointError(f"{found}: it has no tensor {MODEL}{missing[0]} ({len(missing)} are missing)")
    try:
        return {name: tensors.read(f"{MODEL}{name}") for name in names}
    finally:
        tensors.close()


class MergedWeights(SavedWeights):
    """A checkpoint with adapters as the plain model that computes the same: W + scale * B A, one tensor at a time, its
    rows brought to their lengths where there are magnitudes."""

    source = "as in the checkpoint, with its adapters"

    def __init__(
        self,
        found: CheckpointRef,
        manifest: Manifest,
        keys: Keys,
        config: Config,
        dtype: torch.dtype | None,
        state: dict[str, Any],
    ) -> None:
        """Raises ConfigError where the model lies elsewhere and is not there as it was."""
        self._lora: LoraConfig = config.lora
        self._adapter = saved_adapter(found, manifest, keys, config)
        self._targets = {target.weight: target for target in targets(config.model, config.lora)}
        self._folder: HuggingFaceWeights | None = None
        if has_adapters_alone(manifest.tensors, config.lora):
            self._folder = model_of_adapters(found, config, state)
        self._errors: dict[str, tuple[float, float]] = {}
        self._lengths: dict[str, tuple[Tensor, Tensor]] = {}
        super().__init__(found, manifest, keys, config.model, dtype)

    def _look_up(self, every: dict[str, Part]) -> tuple[torch.dtype, dict[str, Part]]:
        if self._folder is None:
            return super()._look_up(every)
        entries = {name: self._folder.entry(part.ours) for name, part in every.items()}
        kinds = {TORCH_DTYPES[entry.dtype] for entry in entries.values()}
        order = sorted(every, key=lambda name: (entries[name].file, entries[name].start))
        return max(kinds, key=lambda kind: kind.itemsize), {name: every[name] for name in order}

    def read(self, name: str) -> Tensor:
        """As `SavedWeights.read`; remembers what rounding has changed."""
        part = self.parts[name]
        exact = part.to_theirs(self._box(part.ours, part.offset, part.size))
        rounded = self._rounded(exact, name)
        if part.ours in self._targets:
            added = exact.double() - part.to_theirs(self._model_box(part.ours, part.offset, part.size)).double()
            error = rounded.double() - exact.double()
            self._errors[name] = (float(error.square().sum()), float(added.square().sum()))
        return rounded

    def adapter(self) -> dict[str, Tensor]:
        """The adapters as `write_adapter` takes them: of a magnitude the whole length."""
        found = dict(self._adapter)
        for target in self._targets.values() if self._lora.use_dora else ():
            own, _ = self._rows(target)
            name = f"{target.module}.magnitude"
            found[name] = (own + found[name].double()).float()
        return found

    @property
    def rounding(self) -> float:
        """What rounding has changed in the weights with adapters, over what the adapters have added (L2)."""
        errors, added = map(sum, zip(*self._errors.values(), strict=True)) if self._errors else (0.0, 0.0)
        return (errors / added) ** 0.5 if added else 0.0

    def _box(self, ours: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        box = self._model_box(ours, offset, size)
        if (target := self._targets.get(ours)) is None:
            return box
        a, b = self._adapter[f"{target.module}.A"], self._adapter[f"{target.module}.B"]
        cut = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
        if target.num_experts:  # (E, in, r) and (E, r, out)
            delta = a[cut[0], cut[1]].double() @ b[cut[0], :, cut[2]].double()
        else:
            delta = b[cut[0]].double() @ a[:, cut[1]].double()
        whole = box.double() + delta * self._lora.scale
        if self._lora.use_dora:
            own, now = self._rows(target)
            magnitude = own + self._adapter[f"{target.module}.magnitude"].double()
            whole *= (magnitude / now)[cut[0]].unsqueeze(1)
        return whole.float()

    def _rows(self, target: Target) -> tuple[Tensor, Tensor]:
        """(out,) each, float64: the length of every row without and with B A."""
        if target.weight not in self._lengths:
            weight = self._model_box(target.weight, (0, 0), logical_shapes(self.config)[target.weight]).double()
            a, b = (self._adapter[f"{target.module}.{key}"].double() for key in "AB")
            now = (weight + b @ a * self._lora.scale).norm(dim=1).clamp_(min=torch.finfo(torch.float32).tiny)
            self._lengths[target.weight] = weight.norm(dim=1), now
        return self._lengths[target.weight]

    def _model_box(self, ours: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """Without adapters."""
        if self._folder is None:
            return super()._box(ours, offset, size)
        rows = self._folder.read(ours, offset[0], size[0])
        return rows[(slice(None), *(slice(o, o + n) for o, n in zip(offset[1:], size[1:], strict=True)))]


def model_of_adapters(found: CheckpointRef, config: Config, state: dict[str, Any]) -> HuggingFaceWeights:
    """The folder that a run with adapters has started from. Raises ConfigError where it is not there as it was."""
    before = state.get("pretrained") or {}
    folder = Path(str(config.model.from_pretrained if before.get("folder") is None else before["folder"]))
    said = f"{found}: the model of its adapters, {folder}"
    wrong = [name for name, digest in sha256_of(folder, before["files"]).items() if digest != before["files"][name]]
    if wrong:
        raise ConfigError(f"{said}: {wrong[0]} is not there, or not what it was when they were trained")
    try:
        return HuggingFaceWeights(folder, config.model)
    except ValueError as error:
        raise ConfigError(f"{said}: {error}") from error
