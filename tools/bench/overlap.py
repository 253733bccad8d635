"""How much of a training step two ranks wait for each other's messages, with overlap off and on, over a limited cable.

    python tools/bench/overlap.py [--quick] [--json FILE] [--links 1gbit,100mbit] [--chunks 2,4]

The decoder of `train_step.py`, 1,024 tokens a rank, AdamW, clipping, experts over both ranks:

- `off`: gradients are summed after backward, tokens travel in one piece;
- `on`: gradients travel during backward;
- `on, N pieces`: tokens travel in N pieces too (`parallel.dispatch_chunks`).

Contenders take turns, step by step. `exposed` is what the rank that waits least waits for rows and gradients: what the
other waits more, it waits for that rank's computing. `hidden` is how long messages travelled while a rank computed. All
are medians, `cpu` the processor seconds of a rank, which pieces cost and other work on the cores does not change.

Top-level keys of the JSON: `exposed_share` (of the step) and `milliseconds`, by link, shape and contender.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from links import LOOPBACK, is_possible, link, on_both_hosts
from train_step_peers import LENGTH, RATE, SEQUENCES, SHAPES, SIZES, config_of

COLUMNS = ("step", "exposed", "hidden", "cpu")


def measure(shape: str, bf16: bool, rounds: int, chunks: list[int]) -> dict[str, list[dict[str, float]]]:
    """In one rank: seconds of every step by contender."""
    import torch
    import torch.distributed as dist

    from moe_dist.data.batch import Batch
    from moe_dist.parallel.comm_timer import Clock
    from moe_dist.parallel.engines.replicated import ReplicatedEngine
    from moe_dist.parallel.flight import Trace
    from moe_dist.parallel.layout import Layout
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.train.balance import Balancer
    from moe_dist.train.build import build_model
    from moe_dist.train.step import TrainStep

    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    config = config_of(shape, bf16, late=False)
    mesh = Mesh.create(Layout(world_size=2, pp_size=1, ep_size=2), torch.device("cpu"))
    clock, trace = Clock(mesh.device), Trace()
    model = build_model(config, mesh, clock)
    engine = ReplicatedEngine(model, config, mesh)
    clock.trace = trace
    engine.look(trace)
    run = TrainStep(model, mesh, engine, Balancer(model, mesh, 0.0), config)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, SIZES["vocab_size"], (SEQUENCES, LENGTH + 1), generator=generator)
    tokens = SEQUENCES * LENGTH
    batch = Batch(ids[:, :-1], ids[:, 1:], None, None, tokens, tokens, [0, 1], dist.get_rank())
    contenders = {"off": (False, 1), "on": (True, 1)} | {f"on, {n} pieces": (True, n) for n in chunks}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, (early, pieces) in contenders.items():
            engine.overlaps = early
            for layer in model.moe_layers():
                layer.dispatch_chunks = pieces
            dist.barrier()
            trace.take()
            began, worked = time.perf_counter(), time.process_time()
            run([batch], 0, RATE)
            seconds, cpu = time.perf_counter() - began, time.process_time() - worked
            whole = trace.take()[-1]
            if number:
                found[name].append({"step": seconds, "exposed": whole.exposed, "hidden": whole.hidden, "cpu": cpu})
    dist.destroy_process_group()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 Gbit/s, three rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--links", default="loopback,1gbit,100mbit")
    parser.add_argument("--chunks", default="2,4")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    rounds = asked.rounds or (3 if asked.quick else 7)
    if asked.rank:
        chunks = [int(count) for count in asked.chunks.split(",")]
        print(json.dumps(measure(asked.shape, asked.bf16, rounds, chunks)))
        return
    share: dict[str, Any] = {}
    milliseconds: dict[str, Any] = {}
    for rate in ["1gbit"] if asked.quick else asked.links.split(","):
        if rate != LOOPBACK and not is_possible():
            print(f"{rate}: not measured: hosts need root, ip and tc")
            continue
        print(f"\n{rate}, {'bf16' if asked.bf16 else 'fp32'}{'':34}ms" + "".join(f"{name:>10}" for name in COLUMNS))
        for shape in SHAPES:
            arguments = ["--shape", shape, "--rounds", str(rounds), "--chunks", asked.chunks]
            with link(rate) as place:
                both = on_both_hosts(place, __file__, [*arguments, *(["--bf16"] if asked.bf16 else [])])
            for name in both[0]:
                steps = list(zip(both[0][name], both[1][name], strict=True))
                pick = {"step": max, "exposed": min, "hidden": max, "cpu": max}
                each = [{key: pick[key](one[key] for one in ranks) for key in COLUMNS} for ranks in steps]
                told = {key: round(1e3 * statistics.median(one[key] for one in each), 1) for key in COLUMNS}
                of_step = statistics.median(one["exposed"] / one["step"] for one in each)
                share.setdefault(rate, {}).setdefault(shape, {})[name] = round(of_step, 3)
                milliseconds.setdefault(rate, {}).setdefault(shape, {})[name] = told
                numbers = "".join(f"{told[key]:10.1f}" for key in COLUMNS)
                print(f"  {shape:18}{name:26}{numbers}   exposed {of_step:.1%} of the step", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"exposed_share": share, "milliseconds": milliseconds}, indent=1))


if __name__ == "__main__":
    main()
