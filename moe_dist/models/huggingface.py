"""Names and layouts to and from Hugging Face, of every family in `config/families/`.

Two layouts of the same weights are read, in any mixture: the public one of checkpoint files (one matrix per
expert, `mlp.experts.3.gate_proj.weight`, Mixtral `block_sparse_moe.experts.3.w1.weight`), and the fused one
transformers 5 holds in memory (`mlp.experts.gate_up_proj` (E, 2F, D), `mlp.experts.down_proj` (E, D, F)).

Shape suffixes: E experts, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.config.families import Family
from moe_dist.config.huggingface import huggingface_values
from moe_dist.models.shapes import SELECTION_BIAS, logical_shapes
from moe_dist.models.tensor_names import Names, Part, family_of, nonzero_bias, untied_head

State = Mapping[str, Tensor]


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """The contents of Hugging Face's `config.json`. Raises ValueError where no family fits."""
    return huggingface_values(family_of(config), config)


def to_huggingface(model_or_state: nn.Module | State, config: ModelConfig, *, fused: bool = False) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names; `fused`: as `transformers` 5 holds them in memory.

    Raises ValueError naming all missing, unexpected and ill-shaped weights, or a selection bias that is in
    use, for which these models have no place.
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    names = Names(config)
    wanted = names.in_memory() if fused else names.parts()
    shapes, may_lack = logical_shapes(config), {name for name in logical_shapes(config) if _is_bias(name)}
    _check(state, shapes, names.optional | may_lack, "the model's state")
    for name in names.biases:
        if name in state and not state[name].is_meta and state[name].count_nonzero() > 0:
            raise ValueError(nonzero_bias(name, names.family))
    return {
        theirs: part.to_theirs(cut(state[part.ours].detach(), part))
        for theirs, part in wanted.items()
        if theirs not in names.optional and part.ours in state
    }


def from_huggingface(state_dict: State, config: ModelConfig, family: Family | None = None) -> dict[str, Tensor]:
    """Hugging Face's weights, in either layout, under our names: what `Transformer.load_state_dict` takes.

    dtypes stay. `family`: whose they are; None: the one that fits. Raises ValueError naming all missing, unexpected and
    ill-shaped weights.
    """
    names = Names(config, family)
    theirs = {names.public(name): tensor for name, tensor in state_dict.items() if not names.ignores(name)}
    wanted = names.parts(names.fused_layers(theirs))
    _check(theirs, {name: part.shape for name, part in wanted.items()}, names.optional, "the Hugging Face state")
    if config.tie_word_embeddings:
        embedding = theirs["model.embed_tokens.weight"]
        head = theirs.setdefault("lm_head.weight", embedding)
        if head is not embedding and not head.is_meta and not torch.equal(head, embedding):
            raise ValueError(untied_head())
    ours: dict[str, Tensor] = {}
    our_shapes = logical_shapes(config)
    for name, part in wanted.items():
        values = part.to_ours(theirs[name])
        if part.size == our_shapes[part.ours]:
            ours[part.ours] = values.contiguous()
            continue
        if part.ours not in ours:
            ours[part.ours] = values.new_empty(our_shapes[part.ours])
        cut(ours[part.ours], part).copy_(values)
    for name in names.biases:
        ours[name] = torch.zeros(config.num_experts, device=theirs["model.embed_tokens.weight"].device)
    return ours


def cut(tensor: Tensor, part: Part) -> Tensor:
    """The box of one of our weights that a part is, as a view."""
    return tensor[tuple(slice(o, o + n) for o, n in zip(part.offset, part.size, strict=True))]


def _is_bias(ours: str) -> bool:
    return ours.endswith(SELECTION_BIAS)


def _check(state: State, shapes: dict[str, tuple[int, ...]], optional: set[str], what: str) -> None:
    """One ValueError that names everything that does not fit."""
    missing = [name for name in shapes if name not in state and name not in optional]
    unexpected = [name for name in state if name not in shapes and name not in optional]
    ill_shaped = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("ill-shaped", ill_shaped))
        if names
    ]
    if problems:
        raise ValueError(f"{what} does not fit the configuration; " + "; ".join(problems))
