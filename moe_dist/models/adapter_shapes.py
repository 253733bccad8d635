"""Which weights of a model get adapters, and of what shapes these are: from the configuration alone. No torch.

`lora.target_modules` has the words of PEFT; weights have ours. Letters: E experts, r rank of the adapters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from moe_dist.config import ConfigError, LoraConfig, ModelConfig
from moe_dist.config.sections.lora import ALL_LINEAR, TARGETS
from moe_dist.config.sections.model import EXPERT_CHOICE
from moe_dist.models.shapes import Shapes, logical_shapes

_MODULES: dict[str, tuple[str, ...]] = {
    **{word: (f"attention.{word}",) for word in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{word: (f"attention.{word}",) for word in ("q_a_proj", "q_b_proj", "kv_b_proj")},
    "kv_a_proj_with_mqa": ("attention.kv_a_proj",),
    **{word: (f"mlp.{word}", f"moe.shared_expert.{word}") for word in ("gate_proj", "up_proj", "down_proj")},
    "shared_expert_gate": ("moe.shared_expert_gate",),
    "gate": ("moe.router",),
    "experts": ("moe.experts.gate_up", "moe.experts.down"),
    "experts.gate_up_proj": ("moe.experts.gate_up",),
    "experts.down_proj": ("moe.experts.down",),
}
"""Word -> modules within a block; `moe.experts.down` for the stack `moe.experts.w_down`."""
assert {*_MODULES, "lm_head"} == set(TARGETS)


class Target(NamedTuple):
    """One weight with an adapter. `module`: where the adapter is; `weight`: name of what it adds to.

    `num_experts`: of a stack, which has an adapter for each expert; 0: a plain matrix. `num_in`, `num_out`: of the
    linear map.
    """

    module: str
    weight: str
    num_in: int
    num_out: int
    num_experts: int

    def shapes(self, lora: LoraConfig) -> Shapes:
        """A (r, in) and B (out, r); of a stack A (E, in, r) and B (E, r, out), as rows are multiplied by them. With
        `use_dora` the magnitude (out,), too."""
        a: tuple[int, ...]
        b: tuple[int, ...]
        rank = lora.r
        if self.num_experts:
            a, b = (self.num_experts, self.num_in, rank), (self.num_experts, rank, self.num_out)
        else:
            a, b = (rank, self.num_in), (self.num_out, rank)
        pair: Shapes = {f"{self.module}.A": a, f"{self.module}.B": b}
        return pair | {f"{self.module}.magnitude": (self.num_out,)} if lora.use_dora else pair


def targets(model: ModelConfig, lora: LoraConfig) -> list[Target]:
    """Every weight that gets an adapter, in the order of layers; none with `lora.r` 0.

    Raises ConfigError for a word that names nothing in this model.
    """
    if not lora.r:
        return []
    all_of_them = lora.target_modules == ALL_LINEAR
    words = [word for word in _MODULES if "." not in word] if all_of_them else list(lora.target_modules)
    if model.router == EXPERT_CHOICE:  # the same weights, by another rule
        model = model.model_copy(update={"router": "topk"})
    wanted = {word: _MODULES.get(word, ()) for word in words}
    found: dict[str, list[Target]] = {word: [] for word in words}
    for name, shape in logical_shapes(model).items():
        for word, modules in wanted.items():
            if (target := _target(name, shape, word, modules)) is not None:
                found[word].append(target)
    if not all_of_them and (missing := [word for word in words if not found[word]]):
        there = [word for word in TARGETS if any(_in_model(word, model))]
        raise ConfigError(f"lora.target_modules={missing[0]}: this model has none; it has {', '.join(there)}")
    every = {target.module: target for part in found.values() for target in part}
    order = {name: index for index, name in enumerate(logical_shapes(model))}
    return sorted(every.values(), key=lambda target: order[target.weight])


def _in_model(word: str, model: ModelConfig) -> list[bool]:
    modules = _MODULES.get(word, ())
    return [_target(name, shape, word, modules) is not None for name, shape in logical_shapes(model).items()]


def _target(name: str, shape: tuple[int, ...], word: str, modules: tuple[str, ...]) -> Target | None:
    if name == "lm_head.weight":
        return Target("lm_head.lora", name, shape[1], shape[0], 0) if word == "lm_head" else None
    for module in modules:
        if module.startswith("moe.experts."):
            stack = module.removeprefix("moe.experts.")
            if name.endswith(f".moe.experts.w_{stack}"):
                return Target(f"{name.removesuffix(f'w_{stack}')}lora_{stack}", name, shape[1], shape[2], shape[0])
        elif name.endswith(f".{module}.weight"):
            return Target(f"{name.removesuffix('.weight')}.lora", name, shape[1], shape[0], 0)
    return None


def adapter_shapes(model: ModelConfig, lora: LoraConfig) -> Shapes:
    """Name -> shape of every weight of the adapters."""
    return {name: shape for target in targets(model, lora) for name, shape in target.shapes(lora).items()}


def adapter_counts(model: ModelConfig, lora: LoraConfig, layers: Sequence[int] | None = None) -> tuple[int, int]:
    """Weights of adapters outside routed experts, and of all routed experts; `layers`: of a part of the model."""
    num_dense, num_experts = 0, 0
    for target in targets(model, lora):
        layer = None if target.module.startswith("lm_head") else int(target.module.split(".")[1])
        last = model.num_hidden_layers - 1
        if layers is not None and (last if layer is None else layer) not in layers:
            continue
        count = sum(map(prod, target.shapes(lora).values()))
        if target.num_experts:
            num_experts += count
        else:
            num_dense += count
    return num_dense, num_experts


def sentence(model: ModelConfig, lora: LoraConfig) -> str:
    """Which weights have adapters, in words; a warning where the router is among them."""
    counts: dict[str, int] = {}
    for target in targets(model, lora):
        name = target.module.removesuffix(".lora").replace(".lora_", ".")
        kind = re.sub(r"^layers\.\d+\.(?:attention\.)?", "", name)
        counts[kind] = counts.get(kind, 0) + 1
    said = ", ".join(f"{kind} ({count})" for kind, count in counts.items())
    kind = "adapters with magnitudes (DoRA)" if lora.use_dora else "adapters"
    text = f"{kind} of rank {lora.r} on {said}; all other weights are frozen"
    if "moe.router" in counts:
        text += (
            "; moe.router is among them: tokens may go to other experts than in the model (leave out gate to avoid it)"
        )
    return text


def trainable_line(num_trained: int, num_all: int) -> str:
    """As PEFT says it."""
    share = 100 * num_trained / max(1, num_all)
    return f"trainable params: {num_trained:,} || all params: {num_all:,} || trainable%: {share:.4f}"
