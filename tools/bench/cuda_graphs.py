"""A layer with fixed places (`parallel.dispatcher: static`) as CUDA graphs, beside the same layer eagerly.

Forward and backward in turn, at the shapes of Mixtral, OLMoE and Qwen3-30B in bfloat16, with a capacity of 1.25; and
whether results are the same. `gpu.py --only graphs` runs it. Capturing fails where anything waits for the device.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from row_kernels import SHAPES
from torch import Tensor, nn

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.moe import LocalDispatcher, MoE


def measure(clock: Callable[[], float], device: str = "cuda") -> list[dict[str, Any]]:
    """A row for each shape and number of tokens. `clock`: seconds, once the device has done its work."""
    return [one(shape, tokens, clock, device) for shape in SHAPES for tokens in (512, 4096, 16384)]


def one(
    shape: tuple[int, int, int, int], tokens: int, clock: Callable[[], float], device: str, rounds: int = 20
) -> dict[str, Any]:
    """`shape`: experts, top-k, hidden size, width of an expert."""
    eager, x = layer_of(shape, device), torch.randn(1, tokens, shape[2], device=device, dtype=torch.bfloat16)
    upstream, x = torch.randn_like(x), x.requires_grad_()
    layers = {"eager": eager, "graph": torch.cuda.make_graphed_callables(copy.deepcopy(eager), (x,))}
    times: dict[str, list[float]] = {name: [] for name in layers}
    results: dict[str, list[Tensor]] = {}
    for _ in range(rounds + 1):
        for name, layer in layers.items():
            started = clock()
            results[name] = passed(layer, x, upstream)
            times[name].append(clock() - started)
    apart = max(
        float((mine.float() - theirs.float()).norm() / theirs.float().norm())
        for mine, theirs in zip(results["graph"], results["eager"], strict=True)
    )
    seconds = {name: statistics.median(several[1:]) for name, several in times.items()}
    experts, top_k, hidden, width = shape
    return {
        "experts": f"{experts} top-{top_k}, {hidden} -> {width}",
        "tokens": tokens,
        **{f"{name} ms": round(1e3 * seconds[name], 3) for name in layers},
        "eager / graph": round(seconds["eager"] / seconds["graph"], 2),
        "difference": f"{apart:.1e}",
    }


def layer_of(shape: tuple[int, int, int, int], device: str) -> MoE:
    """In training, all experts here."""
    experts, top_k, hidden, width = shape
    sizes = {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "hidden_size": hidden,
        "moe_intermediate_size": width,
    }
    balance = BalanceConfig(capacity_factor=1.25)
    with torch.device(device):
        layer = MoE(ModelConfig.model_validate({**sizes, "num_attention_heads": 1}), balance, 0)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
    layer.router.settle_bias()
    layer.reach_experts_by(LocalDispatcher(experts, static=True))
    return layer.bfloat16()


def passed(layer: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    out = layer(x)
    return [out.detach().clone(), *torch.autograd.grad(out, (x, *layer.parameters()), upstream)]
