"""What Hugging Face calls every tensor of a model, and which box of which weight of ours it is. Imports no torch.

Shape suffixes: E experts, D hidden, F intermediate.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from moe_dist.config import ModelConfig
from moe_dist.config.families import Family, families
from moe_dist.config.huggingface import differences
from moe_dist.models.shapes import SELECTION_BIAS, logical_shapes

if TYPE_CHECKING:
    from torch import Tensor

_BUFFER = re.compile(r"(?:model\.)?(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def family_of(config: ModelConfig) -> Family:
    """The Hugging Face family that computes the same as this configuration; `config.model_type`, if that does.

    Raises ValueError naming what the nearest one has otherwise.
    """
    nearest: dict[int, list[str]] = {}
    for family in sorted(families().values(), key=lambda family: family.model_type != config.model_type):
        try:
            wrong = differences(family, config)
        except ValueError:  # it cannot say anything like it
            continue
        if not wrong:
            return family
        nearest.setdefault(len(wrong), []).append(f"{family.model_type}, has {', '.join(wrong)}")
    said = f"; the nearest, {'; or '.join(nearest[min(nearest)])}" if nearest else ""
    raise ValueError(f"no Hugging Face family is this model{said}")


class Part(NamedTuple):
    """Which box of which weight of ours one Hugging Face tensor is.

    `shape`: of their tensor. `offset`, `size`: of the box, with the dimension of experts where ours is a stack.
    `interleaved`: their last dimension has gate and up in turn, ours one after the other.
    """

    ours: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    transposed: bool = False
    interleaved: bool = False

    @staticmethod
    def whole(ours: str, shape: tuple[int, ...], *, interleaved: bool = False) -> Part:
        """All of one of our weights, as it is."""
        return Part(ours, shape, (0,) * len(shape), shape, interleaved=interleaved)

    def to_theirs(self, box: Tensor) -> Tensor:
        """Our box (`size`) as their tensor (`shape`), contiguous."""
        if self.interleaved:
            return box.unflatten(-1, (2, -1)).transpose(-1, -2).reshape(self.shape)
        turned = box.transpose(-1, -2) if self.transposed else box
        return turned.reshape(self.shape).contiguous()

    def to_ours(self, theirs: Tensor) -> Tensor:
        """Their tensor (`shape`) as our box (`size`); a view of it, unless it is interleaved."""
        if self.interleaved:
            return theirs.unflatten(-1, (-1, 2)).transpose(-1, -2).reshape(self.size)
        if not self.transposed:
            return theirs.reshape(self.size)
        *stack, rows, columns = self.size
        return theirs.reshape(*stack, columns, rows).transpose(-1, -2)

    def of_experts(self, first: int, count: int) -> tuple[Part, int] | None:
        """The part of it that lies in experts [first, first + count) of a stack, and where in their tensor that begins.

        None when it has none of them. A tensor that holds one expert is taken whole.
        """
        start, end = max(first, self.offset[0]), min(first + count, self.offset[0] + self.size[0])
        if start >= end:
            return None
        cut = self._replace(offset=(start, *self.offset[1:]), size=(end - start, *self.size[1:]))
        if len(self.shape) == len(self.size):
            cut = cut._replace(shape=(end - start, *self.shape[1:]))
        return cut, start - self.offset[0]


class Names:
    """What a family calls every tensor of a model.

    `plain`: public name -> part, of all but experts. `biases`: our selection biases, for which it has no place.
    """

    def __init__(self, config: ModelConfig, family: Family | None = None) -> None:
        """`family`: None for the one that fits. Raises ValueError where none does."""
        self.config, self.family = config, family or family_of(config)
        self.plain: dict[str, Part] = {}
        self.biases: list[str] = []
        self._in_memory: dict[str, str] = {}  # name there -> public name
        for ours, shape in logical_shapes(config).items():
            if ".moe.experts." in ours:
                continue
            theirs, there = self.family.name(ours), self.family.name(ours, in_memory=True)
            if theirs is None or there is None:
                if not ours.endswith(SELECTION_BIAS):
                    raise ValueError(f"{ours}: {self.family.model_type} has no name for it")
                self.biases.append(ours)
                continue
            self.plain[theirs] = Part.whole(ours, shape)
            self._in_memory[there] = theirs

    def parts(self, fused_layers: Collection[int] = ()) -> dict[str, Part]:
        """Every tensor by public name, in file order; of tied embeddings the head too.

        `fused_layers`: whose experts are stacks instead of three matrices each; where files have nothing else, all.
        """
        found = dict(self.plain)
        for layer in self.config.moe_layers:
            is_fused = layer in fused_layers or self.family.experts.matrices is None
            found |= self._stacks(layer) if is_fused else self._matrices(layer)
        return found

    def in_memory(self) -> dict[str, Part]:
        """The same by the names of a loaded model of `transformers`."""
        found = {there: self.plain[name] for there, name in self._in_memory.items()}
        for layer in self.config.moe_layers:
            found |= self._stacks(layer)
        return found

    def public(self, name: str) -> str:
        """A name of a loaded model as files have it; any other as it is."""
        return self._in_memory.get(name, name)

    def fused_layers(self, names: Collection[str]) -> set[int]:
        """Layers whose experts stand in a state as stacks."""
        return {layer for layer in self.config.moe_layers if any(name in names for name in self._stacks(layer))}

    def ignores(self, name: str) -> bool:
        """Whether a tensor of a file is none of the model: a buffer that follows from the configuration, or, in
        families that have such, a part of a layer past the last, which predicts tokens further on.
        """
        if (layer := _LAYER.match(name)) and self.family.predicts_further:
            return int(layer[1]) >= self.config.num_hidden_layers
        return _BUFFER.fullmatch(name) is not None

    @property
    def optional(self) -> set[str]:
        """Tensors, of the same name on both sides, that a state may lack."""
        return {"lm_head.weight"} if self.config.tie_word_embeddings else set()

    def _stacks(self, layer: int) -> dict[str, Part]:
        theirs, (experts, hidden, width), names = f"model.layers.{layer}.", self._sizes, self.family.experts
        ours = f"layers.{layer}.moe.experts"
        up, down = (experts, hidden, 2 * width), (experts, width, hidden)
        gate_up_name, down_name = theirs + names.gate_up_stack, theirs + names.down_stack
        if names.is_transposed:
            start = (0, 0, 0)
            return {
                gate_up_name: Part(f"{ours}.w_gate_up", (experts, 2 * width, hidden), start, up, True),
                down_name: Part(f"{ours}.w_down", (experts, hidden, width), start, down, True),
            }
        found = {
            gate_up_name: Part.whole(f"{ours}.w_gate_up", up, interleaved=names.is_interleaved),
            down_name: Part.whole(f"{ours}.w_down", down),
        }
        if self.config.expert == "swiglu_clamped":
            bias = Part.whole(f"{ours}.b_gate_up", (experts, 2 * width), interleaved=names.is_interleaved)
            found |= {f"{gate_up_name}_bias": bias}
            found |= {f"{down_name}_bias": Part.whole(f"{ours}.b_down", (experts, hidden))}
        return found

    def _matrices(self, layer: int) -> dict[str, Part]:
        theirs, (experts, hidden, width) = f"model.layers.{layer}.", self._sizes
        ours, found = f"layers.{layer}.moe.experts", dict[str, Part]()
        assert self.family.experts.matrices is not None
        gate, up, down = self.family.experts.matrices
        for e in range(experts):
            for column, name in ((0, gate), (width, up)):
                box = (e, 0, column), (1, hidden, width)
                found[theirs + name.format(e=e)] = Part(f"{ours}.w_gate_up", (width, hidden), *box, True)
            box = (e, 0, 0), (1, width, hidden)
            found[theirs + down.format(e=e)] = Part(f"{ours}.w_down", (hidden, width), *box, True)
        return found

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.config.num_experts, self.config.hidden_size, self.config.moe_intermediate_size


def nonzero_bias(name: str, family: Family) -> str:
    """Words about a selection bias that is in use."""
    return f"{name}: not zero, and Hugging Face's {family.model_type} has no selection bias"


def untied_head() -> str:
    """Words about a head of its own in a model that says that it has none."""
    return "lm_head.weight: differs from the embedding, but tie_word_embeddings=true"
