"""Whole training steps on two ranks beside other trainers, on one host and over a cable of a limited rate.

    python tools/bench/train_step.py [--quick] [--json FILE] [--links loopback,1gbit,100mbit]

The same decoder everywhere, Qwen3-MoE of two layers, hidden size 512, 1,024 tokens a rank, AdamW, clipping:

- `ours`: experts over both ranks, the rest replicated; `ours_late`: the same, gradients summed after backward;
- `ddp`: `transformers` with its grouped matmuls in DistributedDataParallel, every expert on both ranks;
- `transformers_ep`: `transformers` with its own expert parallelism, all-to-all, the rest sharded by FSDP2;
- `autoep`: the expert parallelism that DeepSpeed gives to models of `transformers`;
- `deepspeed`: `transformers` with the layer of `deepspeed.moe`, experts over both ranks; capacity 1.0: it drops tokens.

Contenders take turns, step by step; figures are medians of the slower rank. Before anything is timed, the first losses
of all but `deepspeed`, which start from the same weights, must agree.

Top-level keys of the JSON: `ratio_to_best_peer` (time of the fastest peer / ours: above 1, ours is faster) and
`milliseconds`, by link, shape and precision.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from links import LOOPBACK, is_possible, link, on_both_hosts
from train_step_peers import LENGTH, PEERS, RATE, SEQUENCES, SHAPES, SIZES, Step, config_of


def ours(shape: str, bf16: bool, late: bool) -> Step:
    import torch
    import torch.distributed as dist

    from moe_dist.data.batch import Batch
    from moe_dist.parallel.engines.registry import build_engine
    from moe_dist.parallel.layout import Layout
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.train.balance import Balancer
    from moe_dist.train.build import build_model
    from moe_dist.train.step import TrainStep

    config = config_of(shape, bf16, late)
    mesh = Mesh.create(Layout(world_size=2, pp_size=1, ep_size=2), torch.device("cpu"))
    model = build_model(config, mesh)
    run = TrainStep(model, mesh, build_engine(model, config, mesh), Balancer(model, mesh, 0.0), config)

    def step(ids: torch.Tensor) -> float:
        tokens = SEQUENCES * LENGTH
        batch = Batch(ids[:, :-1], ids[:, 1:], None, None, tokens, tokens, [0, 1], dist.get_rank())
        return run([batch], 0, RATE).loss

    return step


def measure(shape: str, bf16: bool, rounds: int, without: list[str]) -> dict[str, Any]:
    """In one rank: seconds of every step by contender."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Step]] = {
        "ours": lambda: ours(shape, bf16, late=False),
        "ours_late": lambda: ours(shape, bf16, late=True),
    }
    makers |= {name: partial(make, shape, bf16) for name, make in PEERS.items()}
    steps = {name: make() for name, make in makers.items() if name not in without}
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, SIZES["vocab_size"], (SEQUENCES, LENGTH + 1), generator=generator)
    times: dict[str, list[float]] = {name: [] for name in steps}
    first = {}
    for number in range(rounds + 1):
        for name, step in steps.items():
            dist.barrier()
            began = time.perf_counter()
            loss = step(ids)
            seconds = time.perf_counter() - began
            if number:
                times[name].append(seconds)
            else:
                whole = torch.tensor(loss) / 2  # theirs is of one rank, ours of both
                dist.all_reduce(whole)
                first[name] = float(whole)
    for name in first.keys() - {"deepspeed"}:  # its experts begin with weights of their own
        assert abs(first["ours"] - first[name]) < (2e-2 if bf16 else 1e-4), first
    dist.destroy_process_group()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one precision, three rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--links", default="loopback,1gbit,100mbit")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--without", default="", help="contenders to leave out: ours_late, deepspeed, ...")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    rounds = asked.rounds or (3 if asked.quick else 7)
    without = [name for name in asked.without.split(",") if name]
    if asked.rank:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(sys.stderr):
            times = measure(asked.shape, asked.precisions == "bf16", rounds, without)
        print(json.dumps(times))
        return
    ratio: dict[str, Any] = {}
    milliseconds: dict[str, Any] = {}
    for rate in asked.links.split(","):
        if rate != LOOPBACK and not is_possible():
            print(f"{rate}: not measured: hosts need root, ip and tc")
            continue
        for precision in ["fp32"] if asked.quick else asked.precisions.split(","):
            for shape in SHAPES:
                arguments = ["--shape", shape, "--precisions", precision, "--rounds", str(rounds)]
                with link(rate) as place:
                    both = on_both_hosts(place, __file__, [*arguments, "--without", asked.without])
                medians = {
                    name: statistics.median(max(pair) for pair in zip(*(rank[name] for rank in both), strict=True))
                    for name in both[0]
                }
                best = min(medians[name] for name in PEERS if name in medians) / medians["ours"]
                ratio.setdefault(rate, {}).setdefault(precision, {})[shape] = round(best, 3)
                rounded = {name: round(1e3 * seconds, 1) for name, seconds in medians.items()}
                milliseconds.setdefault(rate, {}).setdefault(precision, {})[shape] = rounded
                told = "  ".join(f"{name} {ms:8.1f} ({ms / rounded['ours']:.2f})" for name, ms in rounded.items())
                print(f"{rate:9}{precision:5}{shape:18}{told}   best peer / ours {best:.2f}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"ratio_to_best_peer": ratio, "milliseconds": milliseconds}, indent=1))


if __name__ == "__main__":
    main()
