"""A dense Hugging Face model as one with experts: MLPs are cut and copied, routers drawn, all else is as it was.

Sparse upcycling (Komatsuzaki et al. 2022, https://arxiv.org/abs/2212.05055), with slices of MLPs as experts and routers
tied in virtual groups (He et al. 2024, https://arxiv.org/abs/2410.07524). docs/pretrained.md says when the first pass
equals the dense model's, and why.

Shape suffixes: E experts, D hidden, F intermediate of the dense MLP.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from moe_dist.checkpoint.shards import TORCH_DTYPES
from moe_dist.config import ConfigError, ModelConfig
from moe_dist.config.huggingface import HuggingFaceModel, model_of, pretrained_config
from moe_dist.models.tensor_names import Names, Part
from moe_dist.pretrained.source import Entry, SliceReader, in_one_line, read_contents

_NAME = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Recipe:
    """What a person asks for: `num_experts` copies of slices of each MLP, cut into `granularity` slices.

    `top_k`: MLPs that a token's experts are worth; they are `granularity` times as many. `shared`: slices of an expert
    that every token passes through; None: as many as the family needs. `noise`: part of each expert's units that are
    drawn anew (Nakamura et al. 2025, https://arxiv.org/abs/2502.19261). `norm_topk_prob`: the weights of a token's
    experts are divided by their sum.
    """

    num_experts: int
    top_k: int
    granularity: int = 1
    shared: int | None = None
    noise: float = 0.0
    norm_topk_prob: bool = True
    seed: int = 0

    def config(self, dense: ModelConfig) -> ModelConfig:
        """The model that comes out of a dense one. Raises ConfigError naming the option that does not fit."""
        parts, shared = self.granularity, self.num_shared(dense)
        if dense.intermediate_size % parts:
            raise ConfigError(f"--granularity {parts}: must divide the MLP's width, {dense.intermediate_size}")
        if self.num_experts % parts:
            raise ConfigError(f"--experts {self.num_experts}: must be a multiple of --granularity {parts}")
        if self.top_k * parts > self.num_experts:
            raise ConfigError(
                f"--top-k {self.top_k}: with --granularity {parts} a token goes to {self.top_k * parts} experts, and "
                f"there are {self.num_experts}"
            )
        if self.top_k * parts == 1 and self.norm_topk_prob:
            raise ConfigError(
                "--top-k 1: the one weight, divided by itself, is always 1, and the router never learns; take "
                "--top-k 2, --granularity 2 or --no-norm-topk-prob"
            )
        if shared > parts:
            raise ConfigError(f"--shared {shared}: the MLP is cut into --granularity {parts} slices, and has no more")
        width = dense.intermediate_size // parts
        changes = {
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k * parts,
            "moe_intermediate_size": width,
            "norm_topk_prob": self.norm_topk_prob,
            "shared_expert_intermediate_size": shared * width,
            "shared_expert_gate": shared > 0,
            "model_type": None,
            "from_pretrained": None,
        }
        try:
            return ModelConfig.model_validate(dense.model_dump() | changes)
        except ValidationError as error:
            raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error

    def num_shared(self, dense: ModelConfig) -> int:
        """Slices of the shared expert. The one family with biases in q, k and v (Qwen2-MoE) cannot be without."""
        return self.shared if self.shared is not None else self.granularity if dense.qkv_bias else 0

    def scale(self, dense: ModelConfig, part: int) -> float:
        """What slice number `part` is multiplied by in routed experts, so that a token's experts sum up to the MLP.

        Of the groups of tied routers a token chooses `top_k`, with each slice once in each. Weights that sum to 1 give
        every slice 1 / granularity in all. A softmax over all experts gives it about top_k / E (He et al., section on
        weight scaling). A slice that the shared expert has too, half as much: a gate of zeros lets through sigmoid(0).
        """
        whole = float(self.granularity) if self.norm_topk_prob else self.num_experts / self.top_k
        return whole / 2 if part < self.num_shared(dense) else whole


class Dense(NamedTuple):
    """A folder with a dense model. `entries`: our name -> the tensor."""

    folder: Path
    found: HuggingFaceModel
    config: ModelConfig
    entries: dict[str, Entry]

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of all its tensors."""
        return {dtype_of(entry) for entry in self.entries.values()}


def read_dense(folder: Path) -> Dense:
    """Its configuration and the headers of its files. Raises ConfigError naming all that is wrong with it."""
    found = pretrained_config(folder, str(folder))
    config = model_of(found)
    if config.moe_layers:
        raise ConfigError(f"{folder}: {found.family.model_type} with {config.num_experts} experts; give a dense model")
    names = Names(config, found.family)
    try:
        contents = read_contents(folder, names)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if contents.problems:
        raise ConfigError(f"{folder}: {in_one_line(contents.problems)}")
    entries = {part.ours: contents.tensors[name] for name, part in names.parts().items() if name in contents.tensors}
    return Dense(folder, found, config, entries)


def dtype_of(entry: Entry) -> torch.dtype:
    """As torch has it."""
    return TORCH_DTYPES[entry.dtype]


class UpcycledWeights:
    """The tensors of the model with experts, each made when it is read: in memory is one layer's MLP.

    `dtype`: of what is read; None: as in the dense model.
    """

    source = "as the dense model gives them"

    def __init__(self, dense: Dense, recipe: Recipe, dtype: torch.dtype | None) -> None:
        """Raises ConfigError where the options do not fit, and where no Hugging Face family is that model."""
        self.dense, self.recipe, self.dtype = dense, recipe, dtype
        self.config = recipe.config(dense.config)
        try:
            self.names = Names(self.config)
        except ValueError as error:
            raise ConfigError(f"{dense.folder}: {dense.found.family.model_type} with such experts: {error}") from error
        self.parts: dict[str, Part] = {
            name: part for name, part in self.names.parts().items() if name not in self.names.optional
        }
        self.shapes = {name: part.shape for name, part in self.parts.items()}
        self._reader = SliceReader(dense.folder)
        self._layer, self._matrices = -1, dict[str, Tensor]()

    @property
    def inequality(self) -> str | None:
        """Why the first pass does not equal the dense model's; None: it does."""
        recipe = self.recipe
        if recipe.noise:
            return f"--noise {recipe.noise:g} draws units anew"
        if not recipe.norm_topk_prob:
            return "weights of a softmax over all experts do not sum to 1"
        rounded = [kind for kind in self.dense.dtypes if self.dtype not in (None, torch.float32, kind)]
        if rounded:
            return f"{self._short(self.dtype)} rounds weights in {self._short(rounded[0])}"
        scales = {recipe.scale(self.dense.config, part) for part in range(recipe.granularity)}
        uneven = [scale for scale in scales if math.frexp(scale)[0] != 0.5]
        mlps = {dtype_of(entry) for ours, entry in self.dense.entries.items() if ".mlp." in ours}
        coarse = ({self.dtype} if self.dtype else mlps) - {torch.float32}
        if uneven and coarse:
            return f"{self._short(coarse.pop())} rounds weights times {uneven[0]:g}; --dtype fp32 does not"
        return None

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of what is read."""
        return self.dense.dtypes if self.dtype is None else {self.dtype}

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a tensor by public name."""
        return self.dtype or dtype_of(self.dense.entries[self._origin(self.parts[name])])

    def blocks(self, name: str) -> Iterator[Tensor]:
        """One: the whole tensor."""
        yield self.read(name)

    def read(self, name: str) -> Tensor:
        """One tensor by public name. Raises ConfigError where a value is not finite, or past what `dtype` holds."""
        part, dtype = self.parts[name], self.dtype_of(name)
        values = self._make(part).to(dtype)
        if not torch.isfinite(torch.stack(torch.aminmax(values))).all():
            raise ConfigError(f"{name}: a value that is not finite in {self._short(dtype)}")
        return values.contiguous()

    def _origin(self, part: Part) -> str:
        """Of our names the one in the dense model that a tensor comes from, or has its type from."""
        match = _NAME.fullmatch(part.ours)
        if match is None or not match[2].startswith("moe."):
            return part.ours
        what = match[2].removeprefix("moe.")
        kind = what.split(".")[1].removesuffix("_proj") if what.startswith("shared_expert.") else "gate"
        if what.startswith("experts."):
            kind = "down" if what == "experts.w_down" else "up" if part.offset[2] else "gate"
        return f"layers.{match[1]}.mlp.{kind}_proj.weight"

    def _make(self, part: Part) -> Tensor:
        origin = self._origin(part)
        if origin == part.ours:
            return self._whole(origin)
        layer, what = _NAME.fullmatch(part.ours).groups()  # type: ignore[union-attr]  # a weight of a layer with experts
        if what == "moe.router.weight":
            return self._router(part)
        if what == "moe.shared_expert_gate.weight":
            return torch.zeros(part.shape)
        matrix = self._matrix(int(layer), origin)
        if what.startswith("moe.shared_expert."):
            width = self.config.shared_expert_intermediate_size
            return matrix[:, :width] if "down_proj" in what else matrix[:width]
        assert what.startswith("moe.experts."), part.ours
        box = self._expert(matrix, int(layer), part.offset[0], origin).T[None]
        return part.to_theirs(box)

    def _whole(self, ours: str) -> Tensor:
        entry = self.dense.entries[ours]
        return self._reader.read(entry, 0, entry.shape[0])

    def _matrix(self, layer: int, ours: str) -> Tensor:
        """Of an MLP, gate and up (F, D), down (D, F). Those of a layer stay until another's are wanted."""
        if layer != self._layer:
            self._layer, self._matrices = layer, {}
        if ours not in self._matrices:
            self._matrices[ours] = self._whole(ours)
        return self._matrices[ours]

    def _router(self, part: Part) -> Tensor:
        """(E, D): one row for each virtual group of neighbours, which have one of each slice."""
        experts, hidden = part.shape
        groups = experts // self.recipe.granularity
        rows = torch.empty(groups, hidden).normal_(
            0.0, self.config.initializer_range, generator=self._generator(part.ours)
        )
        return rows.repeat_interleave(self.recipe.granularity, dim=0)

    def _expert(self, matrix: Tensor, layer: int, expert: int, origin: str) -> Tensor:
        """An expert's gate or up (width, D), or down (D, width), in float32."""
        number, width = expert % self.recipe.granularity, self.config.moe_intermediate_size
        is_down = "down_proj" in origin
        columns = slice(number * width, (number + 1) * width)
        values = (matrix[:, columns] if is_down else matrix[columns]).float()
        if self.recipe.noise:
            values = self._partly_new(values.clone(), 1 if is_down else 0, f"layers.{layer}.experts.{expert}", origin)
        if "gate_proj" in origin:
            return values  # its activation is not linear
        # Up has the power of two nearest to the root, which no type rounds; down the rest.
        scale = self.recipe.scale(self.dense.config, number)
        up = 2.0 ** round(math.log2(scale) / 2)
        return values * (scale / up if is_down else up)

    def _partly_new(self, values: Tensor, dim: int, expert: str, origin: str) -> Tensor:
        """Some units, the same in an expert's three matrices, drawn with the mean and deviation that they had."""
        count = int(self.recipe.noise * values.shape[dim])
        units = torch.randperm(values.shape[dim], generator=self._generator(expert))[:count]
        if not count:
            return values
        old = values.index_select(dim, units)
        new = torch.empty(old.shape).normal_(generator=self._generator(f"{expert}/{origin}"))
        return values.index_copy_(dim, units, new * old.std() + old.mean())

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.recipe.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    @staticmethod
    def _short(dtype: torch.dtype | None) -> str:
        return str(dtype).removeprefix("torch.")
