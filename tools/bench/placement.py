"""What expert placement and copies of hot experts spare: whole steps with experts where balancing put them, with the
hottest of each layer on both ranks, and where their ids put them, in turn.

    python tools/bench/placement.py [--quick] [--json FILE] [--links loopback,1gbit] [--path NAME=GLOB ...]

Two ranks share the experts of a small model and train it on named sources (Python, C headers, Markdown, package notes:
`--path` names others), so that routing is as skewed as it is there: with a load-balancing loss, and without. After so
many steps one decision of `parallel.expert_placement: balanced` is made, from the counts of these steps, and one of
`parallel.replicated_experts` of 1 and of 2. Then they take turns: two steps as experts were, two as decided, two with
a copy of the hottest, two with copies of the two hottest, over and over. Moves are not in the times of steps, and are
told apart; copies come in every step, and are. What a step computes is the same, so only where it is computed differs.

`ratio` is the median step of each / in the order of ids, by the wall's clock and by the busier rank's CPU seconds,
which other work on the machine disturbs less; `tax` is rows of the busiest rank / mean over the measured steps, mean of
layers. For groups of 4 and 8 ranks the tax alone is told: decided from the counts before, on the counts after.

Top-level keys of the JSON: `ratio` by link, balancing and contender, `tax`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from links import LOOPBACK, Link, is_possible, link

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "python": f"{sysconfig.get_paths()['stdlib']}/*.py",
    "headers": "/usr/include/linux/*.h",
    "markdown": f"{ROOT}/docs/*.md",
    "notes": f"{sysconfig.get_paths()['purelib']}/*/METADATA",
}
BALANCING = {"balanced by a loss": 0.01, "not balanced": 0.0}
"""`balance.router_aux_loss_coef`."""
KINDS = ("in order", "decided", "1 copy", "2 copies")
COPIES = {"1 copy": 1, "2 copies": 2}
TURN = 2
"""Steps before experts change ranks again."""
WIDER = (4, 8)


def settings(coef: float, sources: dict[str, str], steps: int, folder: str) -> dict[str, Any]:
    return {
        "model": {
            "vocab_size": 272,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 512,
        },
        "data": {"source": "text", "path": sources, "tokenizer": "bytes", "max_seq_length": 256, "validation_split": 0},
        "balance": {"router_aux_loss_coef": coef},
        "optimizer": {"learning_rate": 2e-3, "lr_scheduler_type": "constant"},
        "parallel": {
            "ep_size": 2,
            "expert_placement": "balanced",
            "placement_interval": 10**6,
            "replicated_experts": max(COPIES.values()),
        },
        "train": {"per_device_train_batch_size": 4, "max_steps": steps, "output_dir": folder},
        "checkpoint": {"save_at_end": False},
        "monitor": {"progress": "none", "tensorboard": False, "logging_steps": 10**6},
    }


def measure(coef: float, sources: dict[str, str], warm: int, turns: int, folder: str) -> dict[str, Any]:
    """In one rank: wall and CPU seconds of the steps of each kind, moves, and taxes by number of ranks."""
    import torch
    import torch.distributed as dist
    from torch import Tensor

    from moe_dist.config import load_mapping
    from moe_dist.parallel.layout import Layout
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.parallel.placement import Cost, better_slots, hottest, tax
    from moe_dist.train import MoETrainer
    from moe_dist.train.placing import Placing

    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    mesh = Mesh.create(Layout(2, 1, 2), torch.device("cpu"))
    rows: list[Tensor] = []
    by_source: list[Tensor] = []
    moves: list[tuple[float, int]] = []
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}

    def decided(placing: Placing, ranks: int) -> dict[int, list[int]]:
        load_LE = torch.stack(rows[:warm]).double().mean(0)
        each = zip(placing.layers, load_LE, strict=True)
        # As it would be with the interval of the default.
        cost = Cost(placing.cost.row_bytes, placing.cost.expert_bytes, 100)
        return {layer: better_slots(load_E, range(len(load_E)), ranks, cost) for layer, load_E in each}

    def copied(placing: Placing, kind: str) -> dict[int, list[int]]:
        load_LE = torch.stack(rows[:warm]).double().mean(0)
        each = zip(placing.layers, load_LE, strict=True)
        return {layer: hottest(load_E, COPIES.get(kind, 0)) for layer, load_E in each}

    class Alternating(MoETrainer):
        """Trains, decides once, and then has each kind in turn."""

        def _one_step(self) -> None:
            step, placement = self.parts.counters.step - warm, self.parts.placing.placement
            kind = KINDS[step // TURN % len(KINDS)]
            if step >= 0 and step % TURN == 0:
                assert placement is not None
                slots = decided(self.parts.placing, 2) if kind == "decided" else placement.home
                dist.barrier()
                began = time.perf_counter()
                sent = placement.move(slots)
                dist.barrier()
                if sent:
                    moves.append((time.perf_counter() - began, sent))
                self.parts.placing.copy(copied(self.parts.placing, kind))
            began, cpu = time.perf_counter(), time.process_time()
            super()._one_step()
            cpu = time.process_time() - cpu
            dist.barrier()
            if step >= 0:
                times[kind].append((time.perf_counter() - began, cpu))
            facts = list(self.parts.balancer.facts.values())
            rows.append(mesh.sum_over("dp", torch.stack([layer.pairs_E for layer in facts])))
            assert facts[0].pairs_NE is not None
            by_source.append(mesh.sum_over("dp", facts[0].pairs_NE.sum(1)))

    steps = warm + len(KINDS) * TURN * turns
    trainer = Alternating(load_mapping(settings(coef, sources, steps, folder)), mesh=mesh)
    loss = trainer.train().losses[-1]
    later_LE = torch.stack(rows[warm:]).double().mean(0)
    taxes = {}
    for ranks in (2, *WIDER):
        placing = trainer.parts.placing
        home, placed = placing.slots, decided(placing, ranks)
        taxes[ranks] = [
            statistics.fmean(
                tax(load_E, (placed if kind == "decided" else home)[layer], ranks, copied(placing, kind)[layer])
                for layer, load_E in zip(placing.layers, later_LE, strict=True)
            )
            for kind in KINDS
        ]
    shares = torch.stack(by_source).double().sum(0)
    dist.destroy_process_group()
    return {
        "times": times,
        "moves": moves,
        "taxes": taxes,
        "loss": loss,
        "load_imbalance": float((later_LE.amax(1) / later_LE.mean(1)).mean()),
        "shares": dict(zip(sources, (shares / shares.sum()).tolist(), strict=True)),
    }


def on_both(place: Link, asked: list[str]) -> list[dict[str, Any]]:
    port = str(21000 + os.getpid() % 20000)
    ranks = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            surroundings = {**os.environ, "RANK": str(number), "WORLD_SIZE": "2", "MASTER_PORT": port}
            surroundings |= {"OMP_NUM_THREADS": "1", **place.surroundings[number]}
            command = [*place.prefixes[number], sys.executable, __file__, "--rank", folder, *asked]
            ranks.append(subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, text=True))
        said = [rank.communicate(timeout=900)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank has failed")
    return [json.loads(text.splitlines()[-1]) for text in said]


def summary(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over steps, of the rank that has the higher one."""
    middle: dict[str, tuple[float, float]] = {}
    for kind in KINDS:
        each = [[statistics.median(clock) for clock in zip(*rank["times"][kind], strict=True)] for rank in ranks]
        middle[kind] = max(wall for wall, _ in each), max(cpu for _, cpu in each)
    home = middle["in order"]
    moves = [max(one) for one in zip(*(rank["moves"] for rank in ranks), strict=True)]
    return {
        "ratio": {
            kind: {"wall": middle[kind][0] / home[0], "busier rank's CPU": middle[kind][1] / home[1]}
            for kind in KINDS[1:]
        },
        "seconds": middle,
        "tax": ranks[0]["taxes"],
        "move_seconds": statistics.median(seconds for seconds, _ in moves),
        "move_bytes": max(sent for _, sent in moves),
        **{key: ranks[0][key] for key in ("loss", "load_imbalance", "shares")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="loopback alone and fewer steps: under three minutes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--links", default=None)
    parser.add_argument("--path", action="append", default=[], metavar="NAME=GLOB", help="other sources, two or more")
    parser.add_argument("--coef", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sources = dict(text.split("=", 1) for text in asked.path) or SOURCES
    warm, turns = (16, 4) if asked.quick else (30, 12)
    if asked.rank:
        print(json.dumps(measure(asked.coef, sources, warm, turns, asked.rank)))
        return
    links = (asked.links or (LOOPBACK if asked.quick else f"{LOOPBACK},1gbit")).split(",")
    if not is_possible():
        links = [LOOPBACK]
    told: dict[str, Any] = {"ratio": {}, "tax": {}, "runs": {}}
    print(f"each / experts in the order of their ids, 2 ranks, {warm} steps before, {TURN * turns} of each kind")
    for rate in links:
        for name, coef in BALANCING.items():
            extra = ["--coef", str(coef), *(["--quick"] if asked.quick else [])]
            extra += [word for source in asked.path for word in ("--path", source)]
            with link(rate) as place:
                found = summary(on_both(place, extra))
            told["ratio"].setdefault(rate, {})[name] = found["ratio"]
            told["tax"][name] = found["tax"]
            told["runs"].setdefault(rate, {})[name] = found
            seconds, cpu_seconds = found["seconds"]["in order"]
            print(
                f"{rate:<9} {name:<18} step {1000 * seconds:.0f} ms, CPU of the busier rank "
                f"{1000 * cpu_seconds:.0f} ms; hottest expert {found['load_imbalance']:.2f}; a move "
                f"{found['move_bytes'] / 1e6:.1f} MB each way, {1000 * found['move_seconds']:.0f} ms"
            )
            for number, kind in enumerate(KINDS):
                ratio = found["ratio"].get(kind, {"wall": 1.0, "busier rank's CPU": 1.0})
                taxes = ", ".join(f"ep {ep} {each[number]:.3f}" for ep, each in found["tax"].items())
                wall, cpu = ratio.values()
                print(f"          {kind:<18} step x {wall:.3f}, CPU of the busier rank x {cpu:.3f}; tax {taxes}")
            print("          " + ", ".join(f"{source} {share:.0%}" for source, share in found["shares"].items()))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
