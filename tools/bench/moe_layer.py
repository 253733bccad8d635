"""Forward + backward of one mixture-of-experts layer beside its peers, in one interleaved run.

    python tools/bench/moe_layer.py [--quick] [--json FILE] [--threads 1] [--clock wall|cpu]

Contenders take turns, round by round, so that a busy machine slows all of them; figures are medians. Peers:
the sparse block of `transformers`' Qwen3-MoE with its `eager` and `grouped_mm` experts, and our own plain
loop. `limit` is dense matmuls of the same FLOPs: what no layer can beat. Ours includes what training needs
and the peers leave out: the auxiliary loss and the load facts. Freed memory is kept, as in our workers, for
all contenders; `--fresh-memory` measures with malloc's default. Ratios are time_peer / time_ours: above 1,
ours is faster.

Not covered: several ranks, skewed routing, a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.malloc_tuning import keep_freed_memory
from moe_dist.models.moe import MoE

PEERS = ("hf_eager", "hf_grouped_mm", "our_loop")
# bfloat16 matmuls are compiled for each number of rows; so many contenders overflow the default of 1024.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
CPU = torch.device("cpu")
SLOW = 3.0
"""Seconds above which a contender runs once instead of in every round; a first step that compiles matmuls takes one."""


@dataclass(frozen=True)
class Cell:
    """One measurement: `experts` of hidden -> width, `top_k` of them for each of `tokens` tokens."""

    experts: int
    top_k: int
    hidden: int
    width: int
    dtype: torch.dtype
    tokens: int

    def __str__(self) -> str:
        kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{self.experts:>3}x{self.hidden}->{self.width} top-{self.top_k} {kind} {self.tokens:>4} tokens"


def cells(quick: bool) -> list[Cell]:
    shapes = [(16, 2, 512, 1024), (128, 8, 512, 256)]
    tokens = [512, 2048] if quick else [512, 2048, 4096]
    dtypes = [torch.float32, torch.bfloat16]
    return [Cell(*shape, dtype, count) for shape in shapes for dtype in dtypes for count in tokens]


def ours(cell: Cell, expert: str) -> MoE:
    config = ModelConfig(
        hidden_size=cell.hidden,
        moe_intermediate_size=cell.width,
        num_experts=cell.experts,
        num_experts_per_tok=cell.top_k,
        expert=expert,
    )
    return MoE(config, BalanceConfig(), layer=0)


def huggingface(cell: Cell, implementation: str) -> torch.nn.Module:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=cell.hidden,
        moe_intermediate_size=cell.width,
        num_experts=cell.experts,
        num_experts_per_tok=cell.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    return Qwen3MoeSparseMoeBlock(config)


class Dense(torch.nn.Module):
    """The arithmetic of the experts as one dense SwiGLU over all rows, without the routing."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.top_k = cell.top_k
        self.up = torch.nn.Parameter(torch.empty(cell.hidden, 2 * cell.width))
        self.down = torch.nn.Parameter(torch.empty(cell.width, cell.hidden))

    def forward(self, x_BSD: Tensor) -> Tensor:
        rows = x_BSD.flatten(0, 1).repeat(self.top_k, 1)
        return (rows @ self.up)[:, : self.down.shape[0]] @ self.down


def contenders(cell: Cell, device: torch.device) -> dict[str, torch.nn.Module]:
    """Layers with the same weights, where they have the same experts."""
    mine, plain = ours(cell, "swiglu"), ours(cell, "swiglu_loop")
    made: dict[str, torch.nn.Module] = {
        "ours": mine,
        "hf_eager": huggingface(cell, "eager"),
        "hf_grouped_mm": huggingface(cell, "grouped_mm"),
        "our_loop": plain,
        "limit": Dense(cell),
    }
    for module in made.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    theirs = made["hf_grouped_mm"]
    with torch.no_grad():
        made["our_loop"].load_state_dict(mine.state_dict())
        theirs.gate.weight.copy_(mine.router.weight)
        theirs.experts.gate_up_proj.copy_(mine.experts.w_gate_up.transpose(1, 2))
        theirs.experts.down_proj.copy_(mine.experts.w_down.transpose(1, 2))
    made["hf_eager"].load_state_dict(theirs.state_dict())
    for layer in (mine, plain):
        layer.balance.count_from_now_on(device)
    return {name: module.to(device, cell.dtype).train() for name, module in made.items()}


def step(module: torch.nn.Module, x: Tensor, upstream: Tensor, clock: Callable[[], float]) -> tuple[float, Tensor]:
    """Seconds of one forward and backward, and the output."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    started = clock()
    out = module(x)
    out.backward(upstream if out.shape == upstream.shape else upstream.flatten(0, 1).repeat(module.top_k, 1))
    return clock() - started, out.detach()


def measure(
    cell: Cell,
    rounds: int,
    clock: Callable[[], float],
    device: torch.device = CPU,
    without: Collection[str] = (),
) -> dict[str, float]:
    """Median seconds of every contender but those `without`; `clock` waits until the device has done its work."""
    torch.manual_seed(0)
    modules = {name: module for name, module in contenders(cell, device).items() if name not in without}
    x = torch.randn(1, cell.tokens, cell.hidden, dtype=cell.dtype, device=device, requires_grad=True)
    upstream = torch.randn(1, cell.tokens, cell.hidden, dtype=cell.dtype, device=device)
    times: dict[str, list[float]] = {}
    outputs: dict[str, Tensor] = {}
    for name, module in modules.items():
        seconds, outputs[name] = step(module, x, upstream, clock)
        if seconds > SLOW:
            times[name] = [seconds]
    for name in outputs.keys() & {"hf_grouped_mm", "our_loop"}:
        error = (outputs[name] - outputs["ours"]).norm() / outputs["ours"].norm()
        assert error < (1e-4 if cell.dtype == torch.float32 else 0.2), f"{name} computes something else: {error}"
    once = set(times)
    for _ in range(rounds):
        gc.collect()
        for name, module in modules.items():
            if name not in once:
                times.setdefault(name, []).append(step(module, x, upstream, clock)[0])
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes and rounds: under a minute on a quiet machine"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="default 9, or 3 with --quick")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: of this process only")
    parser.add_argument("--only", default="", help="only cells whose name contains this")
    parser.add_argument("--fresh-memory", action="store_true", help="malloc's default: return freed memory")
    arguments = parser.parse_args()
    kept = not arguments.fresh_memory and keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    rounds = arguments.rounds or (3 if arguments.quick else 9)
    names = ("ours", *PEERS, "limit")
    print(
        f"ms of one forward + backward, torch {torch.__version__}, {arguments.threads} thread(s), "
        f"{rounds} rounds, freed memory {'kept' if kept else 'returned'}"
    )
    print(f"{'':<36}" + "".join(f"{name:>16}" for name in names) + "   ratio to best peer, to limit")
    results, ratios = [], []
    for cell in cells(arguments.quick):
        if arguments.only not in str(cell):
            continue
        slowest = ("hf_eager",) if arguments.quick and cell.experts > 16 else ()  # tens of seconds for one step
        times = measure(cell, rounds, clock, without=slowest)
        against = {name: times[name] / times["ours"] for name in (*PEERS, "limit") if name in times}
        best = min(against[name] for name in PEERS if name in against)
        ratios.append(best)
        row = f"{cell!s:<36}"
        for name in names:
            text = f"{times[name] * 1000:.1f}" if name in times else "-"
            row += f"{text + (f' ({against[name]:.2f})' if name in against else ''):>16}"
        print(f"{row}   {best:.2f}, {against['limit']:.2f}", flush=True)
        results.append({"cell": str(cell), "seconds": times, "ratios": against, "ratio_to_best_peer": best})
    summary = {"torch": torch.__version__, "threads": arguments.threads, "rounds": rounds, "cells": results}
    if arguments.json:
        arguments.json.write_text(json.dumps(summary | {"worst_ratio_to_best_peer": min(ratios)}, indent=1))
    print(f"worst_ratio_to_best_peer {min(ratios):.3f}")


if __name__ == "__main__":
    main()
