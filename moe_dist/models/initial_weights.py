"""First weights of a model: seeded by logical names, so that every layout begins with the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from moe_dist.config import BalanceConfig, LoraConfig, ModelConfig
from moe_dist.models.experts import ExpertList, Experts, build_experts
from moe_dist.models.grouped import StackedLowRank
from moe_dist.models.layers import LowRank, RMSNorm
from moe_dist.models.lora import initialize_adapters
from moe_dist.models.router import Router, build_router


@torch.no_grad()
def set_initial_weights(
    model: nn.Module, config: ModelConfig, lora: LoraConfig | None, seed: int, device: torch.device | str
) -> None:
    """Allocate what is on the meta device on `device`, and set everything."""
    if any(parameter.is_meta for parameter in model.parameters()):
        # `to_empty` would ask torch's symbolic shapes, of which a plain allocation has no need.
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    std = config.initializer_range
    for name, module in model.named_modules():
        if isinstance(module, (Experts, ExpertList)):
            module.initialize(partial(seed_of, seed, name), std)
            if isinstance(module, Experts):
                _set_buffers(module, lambda: build_experts(config), seed_of(seed, name))
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Router) and not _inside_experts(name):
            _set_buffers(module, lambda: build_router(config, BalanceConfig()), seed_of(seed, name))
            if any(key not in ("weight", "logits_bias_E") for key, _ in module.named_parameters(recurse=False)):
                _reset(module, name, seed_of(seed, name))
            elif module.weight is not None:
                set_normal(module.weight, std, seed_of(seed, name))
            if module.logits_bias_E is not None:
                nn.init.zeros_(module.logits_bias_E)
        elif isinstance(module, (nn.Linear, nn.Embedding)) and not _inside_experts(name):
            if isinstance(module.weight, Tensor):  # else in few bits, and it comes from a folder
                set_normal(module.weight, std, seed_of(seed, name))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (LowRank, StackedLowRank)):
            continue
        elif any(True for _ in module.parameters(recurse=False)) and not _inside_experts(name):
            _reset(module, name, seed_of(seed, name))
    if lora is not None:
        initialize_adapters(model, lora, partial(seed_of, seed))


def seed_of(seed: int, name: str, expert: int | None = None) -> int:
    """Of a parameter, or of one expert's part of a stack, by its global number."""
    digest = hashlib.sha256(f"{seed}/{name}/{'' if expert is None else expert}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def set_normal(weight: Tensor, std: float, seed: int) -> None:
    """Drawn on the host, so the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))


def _set_buffers(module: nn.Module, make: Callable[[], nn.Module], seed: int) -> None:
    """Buffers as their class makes them, under a seed of their own: on the meta device there were no values."""
    buffers = dict(module.named_buffers())
    if not buffers:
        return
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        fresh = make()
    for name, buffer in buffers.items():
        buffer.copy_(fresh.get_buffer(name))


def _inside_experts(name: str) -> bool:
    return ".experts." in name


def _reset(module: nn.Module, name: str, seed: int) -> None:
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        raise ValueError(
            f"{name} ({type(module).__name__}) holds parameters of its own: give the class a reset_parameters() method"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        reset()
