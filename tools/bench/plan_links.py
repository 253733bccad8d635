"""Does a plan put layouts in the order in which they are fast? Measured between two hosts with a slow cable.

    python tools/bench/plan_links.py --links 1gbit,100mbit

Hosts are network namespaces with one rank each (`links.py`): needs root, `ip` and `tc`. The cluster is calibrated by
the ranks themselves before anything is planned, then all layouts train a few steps, in turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from moe_dist.config import Config  # noqa: E402
from moe_dist.plan.cluster import cluster_of  # noqa: E402
from moe_dist.plan.search import estimate  # noqa: E402
from tools.bench.links import Link, is_possible, link  # noqa: E402

SEQUENCES, LENGTH, WORLD = 8, 128, 2
MODEL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 2,
}


def layouts() -> list[Config]:
    """With the same sequences in a step each."""
    found = []
    for ep, zero, micro in itertools.product((1, 2), (0, 1, 3), (2, 4)):
        found.append(_config({"ep_size": ep, "zero_stage": zero}, micro, SEQUENCES // WORLD // micro))
    for schedule, micro in (("1f1b", 2), ("1f1b", 4), ("gpipe", 4), ("interleaved_1f1b", 4)):
        found.append(_config({"pp_size": 2, "schedule": schedule}, micro, SEQUENCES // micro))
    return found


def _config(parallel: dict[str, Any], micro: int, accumulation: int) -> Config:
    train = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
    data = {"max_seq_length": LENGTH, "document_mask": False}
    parallel = parallel | {"embedding_grad_reduce": "whole"}  # as when the figures that tests keep were measured
    return Config.model_validate({"model": MODEL, "data": data, "parallel": parallel, "train": train})


def measure(rounds: int) -> dict[str, Any]:
    """On a rank: the cluster, and seconds of a step of every layout."""
    import torch
    import torch.distributed as dist

    from moe_dist.data.batch import Batch
    from moe_dist.parallel.layout import Layout
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.plan.calibration import measured_device, measured_links
    from moe_dist.verify.trial import Trial

    torch.set_num_threads(1)
    device = torch.device("cpu")
    dist.init_process_group("gloo")
    keys = measured_device(device) | measured_links(device)
    trials = []
    for config in layouts():
        dist.barrier()
        mesh = Mesh.create(Layout.of(config, WORLD), device)
        count = config.train.gradient_accumulation_steps * mesh.layout.dp_size
        shape = config.train.per_device_train_batch_size, LENGTH
        batches = []
        for index in range(count):
            ids = torch.randint(0, MODEL["vocab_size"], shape, generator=torch.Generator().manual_seed(index))
            batches.append(Batch(ids, ids, None, None, ids.numel(), ids.numel(), [index], index))
        trials.append((Trial(config, mesh), batches))
    steps: list[list[float]] = [[] for _ in trials]
    for step in range(rounds + 1):  # in turns: what else runs here meets all of them
        for (trial, batches), times in zip(trials, steps, strict=True):
            dist.barrier()
            began = time.perf_counter()
            trial.step(trial.share(batches), step, 1e-3)
            times.append(time.perf_counter() - began)
    dist.barrier()
    return {"cluster": keys, "steps": [times[1:] for times in steps]}


def on_both(place: Link, rounds: int) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--rank", "--rounds", str(rounds)]
    port = str(21000 + os.getpid() % 20000)
    ranks = []
    for number, (prefix, own) in enumerate(zip(place.prefixes, place.surroundings, strict=True)):
        surroundings = {**os.environ, "RANK": str(number), "WORLD_SIZE": "2", "MASTER_PORT": port, **own}
        surroundings["OMP_NUM_THREADS"] = "1"
        ranks.append(subprocess.Popen([*prefix, *command], env=surroundings, stdout=subprocess.PIPE, text=True))
    said = [rank.communicate(timeout=900)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank has failed")
    return [json.loads(text.splitlines()[-1]) for text in said]


def kendall(first: list[float], second: list[float]) -> float:
    """Tau: pairs in the same order less pairs in the other, by all pairs."""
    pairs = list(itertools.combinations(range(len(first)), 2))
    same = sum(((first[i] < first[j]) == (second[i] < second[j])) - 0.5 for i, j in pairs)
    return 2 * same / len(pairs)


def rows_of(both: list[dict[str, Any]], **machine: Any) -> list[tuple[str, float, float]]:
    """Name, measured and planned seconds of every layout, from what both ranks have said."""
    keys = {key: statistics.mean(rank["cluster"][key] for rank in both) for key in both[0]["cluster"]}
    cluster = cluster_of("cpu").model_copy(update=keys | {"devices_per_host": 1} | machine)
    rows = []
    for number, config in enumerate(layouts()):
        steps = [max(pair) for pair in zip(*(rank["steps"][number] for rank in both), strict=True)]
        one = estimate(config, WORLD, cluster)
        rows.append((one.name, statistics.median(steps), one.time.total))
    return rows


def compared(rate: str, both: list[dict[str, Any]]) -> list[str]:
    """As a table, with tau and how far the plan's best is from the measured best."""
    rows = rows_of(both)
    tau = kendall([row[1] for row in rows], [row[2] for row in rows])
    fastest, planned = min(rows, key=lambda row: row[1]), min(rows, key=lambda row: row[2])
    lines = [
        f"{rate}: tau {tau:.2f}, the plan's best is {planned[1] / fastest[1] - 1:.0%} slower than the measured best"
    ]
    lines += ["", "| layout | measured s | planned s | error |", "|---|---|---|---|"]
    rows.sort(key=lambda row: row[1])
    lines += [f"| {name} | {seen:.2f} | {told:.2f} | {told / seen - 1:+.0%} |" for name, seen, told in rows]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", default="1gbit,100mbit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="write what the ranks measured as JSON")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        print(json.dumps(measure(asked.rounds)), flush=True)
        os._exit(0)  # threads of many process groups
    if not is_possible():
        raise SystemExit("not measured: hosts need root, ip and tc")
    kept = {}
    for rate in asked.links.split(","):
        with link(rate) as place:
            kept[rate] = on_both(place, asked.rounds)
        if asked.keep:
            asked.keep.write_text(json.dumps(kept))
        print("\n".join(compared(rate, kept[rate])), flush=True)


if __name__ == "__main__":
    main()
