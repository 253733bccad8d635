"""What 128 experts cost where 16 did, when a token uses as many weights as before: one layer, forward and backward.

    python tools/bench/experts_scaling.py [--quick] [--json FILE] [--tokens 1024,4096] [--clock cpu|wall]

16 experts of 512 -> 1024, top-2, against 128 experts: `finer` of 512 -> 256, top-8 (a quarter as wide, four times as
many for a token, as fine-grained models have them), and `more` of the same width, top-2 (eight times as many weights,
all of which get a gradient). Beside it the sparse block of `transformers`' Qwen3-MoE with its `grouped_mm` experts.
Layers are those of `moe_layer.py`, float32, one thread, and take turns; a figure is the median of the ratios of all
rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from moe_layer import Cell, huggingface, ours, step

from moe_dist.models.malloc_tuning import keep_freed_memory

FEW = (16, 2, 512, 1024)
MANY = {"finer": (128, 8, 512, 256), "more": (128, 2, 512, 1024)}


def layer(name: str, shape: tuple[int, int, int, int], tokens: int) -> torch.nn.Module:
    cell = Cell(*shape, torch.float32, tokens)
    made: torch.nn.Module
    if name == "ours":
        made = mine = ours(cell, "swiglu")
        mine.balance.count_from_now_on(torch.device("cpu"))
    else:
        made = huggingface(cell, "grouped_mm")
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return made.train()


def measure(many: tuple[int, int, int, int], tokens: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """By contender: cost of `many` over `FEW`, its spread over rounds, and milliseconds of both."""
    torch.manual_seed(0)
    layers = {(name, shape): layer(name, shape, tokens) for name in ("ours", "transformers") for shape in (FEW, many)}
    x, upstream = torch.randn(1, tokens, 512, requires_grad=True), torch.randn(1, tokens, 512)
    times: dict[Any, list[float]] = {key: [] for key in layers}
    for number in range(rounds + 1):  # the first warms up
        gc.collect()
        for key, module in layers.items():
            seconds, _ = step(module, x, upstream, clock)
            if number:
                times[key].append(seconds)
    found = {}
    for name in ("ours", "transformers"):
        each = sorted(b / a for a, b in zip(times[name, FEW], times[name, many], strict=True))
        middle = [1000 * statistics.median(times[name, shape]) for shape in (FEW, many)]
        found[name] = {"ratio": statistics.median(each), "spread": (each[0], each[-1]), "ms": middle}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under three minutes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", default="1024,4096")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu", help="cpu: of this process only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    rounds = arguments.rounds or (3 if arguments.quick else 15)
    print(f"128 experts / 16, torch {torch.__version__}, 1 thread, {rounds} rounds, {arguments.clock} clock")
    costs: dict[str, dict[str, float]] = {}
    told: dict[str, Any] = {"torch": torch.__version__, "rounds": rounds, "clock": arguments.clock, "figures": {}}
    for kind, many in MANY.items():
        for tokens in map(int, arguments.tokens.split(",")):
            found = measure(many, tokens, rounds, clock)
            told["figures"][f"{kind} {tokens}"] = found
            costs.setdefault(kind, {})[str(tokens)] = found["ours"]["ratio"]
            for name, row in found.items():
                (low, high), (few, more) = row["spread"], row["ms"]
                print(
                    f"{kind:<6} {tokens:>5} tokens  {name:<13} {row['ratio']:.2f} ({low:.2f} to {high:.2f})"
                    f" {few:7.1f} -> {more:7.1f} ms",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(told | {"cost_128_over_16": costs}, indent=1))


if __name__ == "__main__":
    main()
