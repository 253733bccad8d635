"""How many weights a run trains, from its configuration alone. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from moe_dist.config import Config, ModelConfig
from moe_dist.config.trained_weights import TrainedWeights
from moe_dist.models.adapter_shapes import adapter_shapes
from moe_dist.models.shapes import SELECTION_BIAS, STACKED, Shapes, logical_shapes

_BUILT_IN = {"router": "topk", "expert": "swiglu"}


@dataclass(frozen=True)
class TrainedCounts:
    """Of some layers. `routers` are among `dense`; `experts` are whole stacks of which any expert is trained, for those
    have gradients; `moved`: of these what the optimizer moves, for each block of experts over `ep`.
    """

    dense: int
    routers: int
    experts: int
    moved: tuple[int, ...]

    @property
    def total(self) -> int:
        """Weights that are trained."""
        return self.dense + sum(self.moved)


def trainable_shapes(config: Config) -> Shapes:
    """Name -> shape of every weight that would be trained with nothing frozen."""
    return adapter_shapes(config.model, config.lora) if config.lora.r else _own_shapes(config.model)


def check_trained(config: Config, trained: TrainedWeights) -> None:
    """Raises ConfigError for what names nothing, and where nothing would be trained. Of a model with classes of a
    person's own nobody knows before it is built."""
    if not trained.are_all and not has_own_classes(config):
        trainable = trainable_shapes(config)
        trained.check([*_own_shapes(config.model), *trainable], trainable)


def _own_shapes(model: ModelConfig) -> Shapes:
    """Of the model's weights. Of a router or an expert of a class of one's own those that the built-in ones have."""
    if model.router != "topk":
        model = model.model_copy(update={"router": _BUILT_IN["router"]})
    if model.expert not in STACKED:
        model = model.model_copy(update={"expert": _BUILT_IN["expert"]})
    tied = {"lm_head.weight"} if model.tie_word_embeddings else set()
    return {
        name: shape
        for name, shape in logical_shapes(model).items()
        if name not in tied and not name.endswith(SELECTION_BIAS)
    }


def trained_counts(
    config: Config, trained: TrainedWeights, layers: Sequence[int] | None = None, num_blocks: int = 1
) -> TrainedCounts:
    """Of the whole model, or of these layers: with the first go the embeddings, with the last the head."""
    dense = routers = experts = 0
    moved = [0] * num_blocks
    for name, shape in _of_layers(config, layers):
        part, size = trained.part(name), prod(shape)
        if part is False:
            continue
        if ".moe.experts." not in name:
            dense += size
            routers += size if ".moe.router." in name else 0
            continue
        experts += size
        share = shape[0] // num_blocks
        for block in range(num_blocks):
            held = range(block * share, (block + 1) * share)
            moved[block] += size // shape[0] * (share if part is True else len(part.intersection(held)))
    return TrainedCounts(dense, routers, experts, tuple(moved))


def _of_layers(config: Config, layers: Sequence[int] | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    last = config.model.num_hidden_layers - 1
    for name, shape in trainable_shapes(config).items():
        number = re.match(r"layers\.(\d+)\.", name)
        layer = int(number[1]) if number else 0 if name.startswith("embed_tokens") else last
        if layers is None or layer in layers:
            yield name, shape


def has_own_classes(config: Config) -> bool:
    """Whether only a model that has been built knows the names of all weights."""
    model = config.model
    return bool(model.moe_layers) and (model.router not in ("topk", "expert_choice") or model.expert not in STACKED)


def trained_sentence(config: Config, trained: TrainedWeights) -> str:
    """What is trained, in words."""
    counts = trained_counts(config, trained)
    names = list(trainable_shapes(config))
    parts = {name: trained.part(name) for name in names}
    whole = sum(part is True for part in parts.values())
    some = sum(part is not True and part is not False for part in parts.values())
    in_part = f", {some} in part (single experts)" if some else ""
    kind = "tensors of adapters" if config.lora.r else "tensors"
    said = f"{whole + some} of {len(names)} {kind} are trained{in_part}: {counts.total:,} weights"
    return f"{said}; all others stay as they are"
