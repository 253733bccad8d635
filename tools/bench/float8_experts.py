"""Experts in float8 (`train.expert_precision: fp8`) beside bfloat16: forward and backward, and a short training.

In turn, at the shapes of Mixtral, OLMoE and Qwen3-30B; how far results are apart, and losses of a training that learns
one batch. Emulated where there is no kernel, which the table says. `gpu.py --only float8` runs it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_dist.config import load_mapping
from moe_dist.data.batch import Batch
from moe_dist.models.experts import Experts
from moe_dist.models.float8 import kernel_takes
from moe_dist.parallel.engines.registry import build_engine
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.balance import Balancer
from moe_dist.train.build import build_model
from moe_dist.train.step import TrainStep

SHAPES = [(8, 2, 4096, 14336), (64, 8, 2048, 1024), (128, 8, 2048, 768)]
"""Experts, top-k, hidden size, width of an expert."""
SMALL = [(4, 2, 32, 16)]
NAMES = ("compute", "fp8")


def products(device: str, small: bool, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """A row for each shape and number of tokens. `clock`: seconds, once the device has done its work."""
    found = []
    for count, top_k, hidden, width in SMALL if small else SHAPES:
        experts = Experts(count, hidden, width)
        experts.initialize(lambda expert: expert, 0.02)
        experts = experts.to(device, torch.bfloat16)
        for tokens in (16,) if small else (4096, 16384):
            rows, upstream = torch.randn(2, tokens * top_k, hidden, device=device, dtype=torch.bfloat16)
            rows.requires_grad_()
            sizes = torch.full((count,), tokens * top_k // count, device=device)
            times: dict[str, list[float]] = {name: [] for name in NAMES}
            results: dict[str, list[Tensor]] = {}
            for _ in range(3 if small else 15):
                for experts.precision in NAMES:
                    started = clock()
                    out = experts(rows, sizes)
                    gradients = torch.autograd.grad(out, [rows, *experts.parameters()], upstream)
                    times[experts.precision].append(clock() - started)
                    results[experts.precision] = [out.detach(), *gradients]
            apart = max(
                float((mine.float() - theirs.float()).norm() / theirs.float().norm())
                for mine, theirs in zip(results["fp8"], results["compute"], strict=True)
            )
            seconds = {name: statistics.median(several[1:]) for name, several in times.items()}
            found.append(
                {
                    "what": f"{count} experts top-{top_k}, {hidden} -> {width}, {tokens} tokens",
                    "by": "kernel" if kernel_takes(rows, experts.w_down) else "emulation",
                    "bfloat16 ms": round(1e3 * seconds["compute"], 3),
                    "fp8 ms": round(1e3 * seconds["fp8"], 3),
                    "bfloat16 / fp8": round(seconds["compute"] / seconds["fp8"], 2),
                    "difference": f"{apart:.1e}",
                }
            )
    return found


def training(device: str, model: dict[str, int], batch: Batch, steps: int) -> dict[str, Any]:
    """Losses of the same training in bfloat16, with experts in float8 and without."""
    losses: dict[str, list[float]] = {}
    for name in NAMES:
        train = {"pure_bf16": True, "expert_precision": name}
        config = load_mapping({"model": model, "data": {"max_seq_length": batch.num_tokens}, "train": train})
        mesh = Mesh.single(device)
        net = build_model(config, mesh)
        run = TrainStep(net, mesh, build_engine(net, config, mesh), Balancer(net, mesh, 1e-3), config)
        losses[name] = [run([batch], step, 3e-4).loss for step in range(steps)]
    apart = max(abs(fp8 - plain) / plain for fp8, plain in zip(losses["fp8"], losses["compute"], strict=True))
    return {
        "what": f"training, {steps} steps",
        "first loss": round(losses["compute"][0], 4),
        **{f"last loss, {name}": round(several[-1], 4) for name, several in losses.items()},
        "difference": f"{apart:.1e}",
    }
