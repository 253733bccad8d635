"""Adapters put beside the weights of a model, which is frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_dist.config import ConfigError, LoraConfig, ModelConfig
from moe_dist.models.adapter_shapes import targets
from moe_dist.models.grouped import StackedLowRank
from moe_dist.models.layers import DecomposedLowRank, LowRank
from moe_dist.models.router import Router

SeedOf = Callable[[str, int | None], int]
"""(name of a parameter, global expert id) -> seed of its first values."""


def add_adapters(model: nn.Module, config: ModelConfig, lora: LoraConfig) -> None:
    """Freeze every weight of `model`, a whole one or some of its layers, and put in the adapters of `lora`, in place.

    Best on the meta device, before experts are spread. Raises ConfigError for what cannot be adapted.
    """
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    for target in targets(config, lora):
        name, _, attribute = target.module.rpartition(".")
        holder = modules.get(name)
        if holder is None:  # of another stage
            continue
        if isinstance(holder, Router) and type(holder).logits is not Router.logits:
            raise ConfigError(
                f"lora.target_modules=gate: {type(holder).__name__} has logits of its own; leave out gate"
            )
        sizes = (target.num_in, target.num_out, lora.r, lora.scale, lora.dropout)
        dense = DecomposedLowRank if lora.use_dora else LowRank
        adapter = StackedLowRank(target.num_experts, *sizes) if target.num_experts else dense(*sizes)
        setattr(holder, attribute, adapter)


def adapters(model: nn.Module) -> Iterable[tuple[str, LowRank | StackedLowRank]]:
    """Name -> adapter, of those held here."""
    return ((name, part) for name, part in model.named_modules() if isinstance(part, (LowRank, StackedLowRank)))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is what it was before it had adapters, bit for bit."""
    found = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], part) for name, part in adapters(model)
    ]
    for holder, attribute, _ in found:
        setattr(holder, attribute, None)
    try:
        yield
    finally:
        for holder, attribute, part in found:
            setattr(holder, attribute, part)


@torch.no_grad()
def initialize_adapters(model: nn.Module, lora: LoraConfig, seed_of: SeedOf) -> None:
    """First values: seeded by name and expert, so equal in every layout."""
    first = {
        f"{name}.lora_{stack}": module.first_expert
        for name, module in model.named_modules()
        for stack in ("gate_up", "down")
        if hasattr(module, f"lora_{stack}")
    }
    for name, adapter in adapters(model):
        if isinstance(adapter, DecomposedLowRank):
            adapter.magnitude.zero_()
        for key, weight in (("A", adapter.A), ("B", adapter.B)):
            if isinstance(adapter, StackedLowRank):
                for index in range(len(weight)):  # here (in, out), as rows are multiplied by it
                    _fill(weight[index].t(), key, lora, seed_of(f"{name}.{key}", first[name] + index))
            else:
                _fill(weight, key, lora, seed_of(f"{name}.{key}", None))


def _fill(weight: Tensor, key: str, lora: LoraConfig, seed: int) -> None:
    """One matrix (out, in)."""
    generator, values = torch.Generator().manual_seed(seed), torch.empty(weight.shape)
    if key == "B" and lora.init != "random":
        weight.zero_()
        return
    if lora.init == "gaussian":
        values.normal_(0.0, 1.0 / lora.r, generator=generator)
    else:  # what `nn.Linear` begins with
        bound = 1.0 / math.sqrt(weight.shape[1])
        values.uniform_(-bound, bound, generator=generator)
    weight.copy_(values)
