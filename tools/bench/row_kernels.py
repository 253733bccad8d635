"""Triton's kernels (`train.kernels: triton`) beside PyTorch's: rows to experts, and back, and the gated unit.

Forward and backward of each, in turn, at the shapes of Mixtral, OLMoE and Qwen3-30B in bfloat16; and how far the
results are apart. `gpu.py --only kernels` runs it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_dist.models.experts import swiglu
from moe_dist.models.permute import Permutation, rows_from_tokens, sort_by_expert, tokens_from_rows

SHAPES = [(8, 2, 4096, 14336), (64, 8, 2048, 1024), (128, 8, 2048, 768)]
"""Experts, top-k, hidden size, width of an expert."""
SMALL = [(4, 2, 8, 16)]
NAMES = ("torch", "triton")


def measure(device: str, small: bool, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """A row for each shape, number of tokens and kernel. `clock`: seconds, once the device has done its work."""
    found = []
    for experts, top_k, hidden, width in SMALL if small else SHAPES:
        for tokens in (8,) if small else (4096, 16384):
            generator = torch.Generator(device).manual_seed(0)
            ids = torch.rand(tokens, experts, device=device, generator=generator).topk(top_k).indices
            orders = {name: sort_by_expert(ids, experts, None, name) for name in NAMES}

            def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
                drawn = torch.randn(*shape, device=device, generator=generator, dtype=torch.bfloat16)
                return drawn.requires_grad_()

            rows, weights = tokens * top_k, torch.rand(tokens, top_k, device=device, requires_grad=True)
            parts = {
                "to experts": (_to_experts, [draw(tokens, hidden)], rows * hidden),
                "and back": (_and_back, [draw(rows, hidden), weights], tokens * hidden),
                "gated unit": (_gated_unit, [draw(rows, 2 * width)], rows * width),
            }
            for what, (run, inputs, size) in parts.items():
                upstream = draw(size).detach()
                row = {"experts": f"{experts} top-{top_k}, {hidden} -> {width}", "tokens": tokens, "what": what}
                found.append(row | _both(run, inputs, upstream, orders, clock, 3 if small else 20))
    return found


def _to_experts(order: Permutation, x_TD: Tensor) -> Tensor:
    return rows_from_tokens(x_TD, order)


def _and_back(order: Permutation, rows_RD: Tensor, weights_TK: Tensor) -> Tensor:
    return tokens_from_rows(rows_RD, weights_TK, order)


def _gated_unit(order: Permutation, gate_up: Tensor) -> Tensor:
    return swiglu(gate_up, "silu", order.kernels)


def _both(
    run: Callable[..., Tensor],
    inputs: list[Tensor],
    upstream: Tensor,
    orders: dict[str, Permutation],
    clock: Callable[[], float],
    rounds: int,
) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    results: dict[str, list[Tensor]] = {}
    for _ in range(rounds + 1):  # in the first Triton compiles
        for name, order in orders.items():
            started = clock()
            out = run(order, *inputs)
            gradients = torch.autograd.grad(out, inputs, upstream.view_as(out))
            times[name].append(clock() - started)
            results[name] = [out.detach(), *gradients]
    apart = max(
        float((mine.float() - theirs.float()).norm() / theirs.float().norm())
        for mine, theirs in zip(results["triton"], results["torch"], strict=True)
    )
    seconds = {name: statistics.median(several[1:]) for name, several in times.items()}
    return {
        **{f"{name} ms": round(1e3 * seconds[name], 3) for name in NAMES},
        "torch / triton": round(seconds["torch"] / seconds["triton"], 2),
        "rows/s": round(orders["triton"].num_rows / seconds["triton"]),
        "difference": f"{apart:.1e}",
    }
