"""Tokens to experts on another rank and back, forward and backward, beside other ways and the bare wire.

    python tools/bench/dispatch.py [--quick] [--json FILE] [--links loopback,1gbit,100mbit] [--ranks-per-host 1]

Two ranks, on one host and on two hosts with a cable of a limited rate between them (network namespaces; needs root,
else loopback alone); or two hosts of several ranks, which share the cable. Contenders take turns, round by round;
figures are medians of the slowest rank. Experts do nothing: what is measured is the way there and back. `limit` sends
the bytes that no way can do without, both directions at once, from buffers that lie ready: each token once to the other
host if one of its experts is there, in each of the four passes (there and back, forward and backward). Bytes to the
other host are counted where they are handed to the group, against that.

Top-level keys of the JSON: `time_over_limit` and `bytes_over_minimum` by link, shape and contender.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from links import LOOPBACK, Link, is_possible, link

SHAPES = {"64 experts top-8": (64, 8), "16 experts top-2": (16, 2)}
"""Experts and how many of them a token has."""
HIDDEN = 512
KINDS = ("hierarchical", "dedup", "dedup in 4", "all_to_all", "all_gather")
PIECES = {"dedup in 4": ("dedup", 4)}
"""Dispatchers whose tokens travel in pieces (`parallel.dispatch_chunks`)."""


def measure(tokens: int, rounds: int, per_host: int) -> dict[str, Any]:
    """In one rank: seconds of every round, and bytes to the other host, by shape and contender."""
    import torch
    import torch.distributed as dist

    from moe_dist.models.routing import Routing
    from moe_dist.parallel.comm_timer import Clock
    from moe_dist.parallel.dispatchers import build_dispatcher
    from moe_dist.parallel.layout import Layout
    from moe_dist.parallel.mesh import Mesh

    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    group, other_host = dist.group.WORLD, 1 - dist.get_rank() // per_host
    peer = (dist.get_rank() + per_host) % (2 * per_host)
    others = range(other_host * per_host, (other_host + 1) * per_host)
    assert group is not None
    mesh = Mesh.create(Layout(2 * per_host, 1, 2 * per_host), torch.device("cpu"), None, per_host)
    kinds = [kind for kind in KINDS if per_host > 1 or kind != "hierarchical"]
    found: dict[str, Any] = {}
    for shape, (experts, top_k) in SHAPES.items():
        generator = torch.Generator().manual_seed(dist.get_rank())
        ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
        x = torch.randn(tokens, HIDDEN, generator=generator)
        weights = torch.rand(tokens, top_k, generator=generator).softmax(-1)
        needed = int((ids // (experts // 2) == other_host).any(1).sum())
        to_me = torch.tensor([needed])
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(2 * per_host)]
        dist.all_gather(counts, to_me)
        coming = int(counts[peer])
        outgoing, incoming = torch.randn(needed, HIDDEN), torch.empty(coming, HIDDEN)

        def wire(outgoing: torch.Tensor = outgoing, incoming: torch.Tensor = incoming) -> None:
            for _ in range(2):  # there and back, forward; and the same in backward
                for sent, received in ((outgoing, incoming), (incoming, outgoing)):
                    works = [dist.irecv(received, peer), dist.isend(sent, peer)]
                    for work in works:
                        assert work is not None
                        work.wait()

        def way(
            kind: str,
            clock: Clock,
            ids: torch.Tensor = ids,
            x: torch.Tensor = x,
            weights: torch.Tensor = weights,
            experts: int = experts,
        ) -> None:
            name, pieces = PIECES.get(kind, (kind, 1))
            dispatcher = build_dispatcher(name, group, experts, 0, clock, mesh.hosts)
            leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
            routing = Routing(leaves[1], ids, complete=True)
            departed = dispatcher.begin_dispatch(leaves[0], routing, pieces)
            returning = [dispatcher.begin_combine(*dispatcher.end_dispatch(one)) for one in departed]
            torch.cat([dispatcher.end_combine(one) for one in returning]).sum().backward()

        clocks = {kind: Clock(torch.device("cpu")) for kind in kinds}
        contenders: dict[str, Callable[[], None]] = {"limit": wire}
        contenders |= {kind: lambda kind=kind, clock=clock: way(kind, clock) for kind, clock in clocks.items()}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds + 1):
            for name, run in contenders.items():
                dist.barrier()
                began = time.perf_counter()
                run()
                seconds = time.perf_counter() - began
                if number:  # the first is for the kernels to be found
                    times[name].append(seconds)
        sent = {}
        for kind, clock in clocks.items():
            traffic = clock.take_traffic().bytes_to
            sent[kind] = sum(traffic[rank] for rank in others) / (rounds + 1) if traffic else None
        row = HIDDEN * x.element_size()
        found[shape] = {"times": times, "bytes": sent, "minimum": 2 * row * (needed + coming)}
    dist.destroy_process_group()
    return found


def on_both(place: Link, tokens: int, rounds: int, per_host: int) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--rank", "--tokens", str(tokens), "--rounds", str(rounds)]
    command += ["--ranks-per-host", str(per_host)]
    port = str(21000 + os.getpid() % 20000)
    ranks = []
    for number in range(2 * per_host):
        prefix, own = place.prefixes[number // per_host], place.surroundings[number // per_host]
        surroundings = {**os.environ, "RANK": str(number), "WORLD_SIZE": str(2 * per_host), "MASTER_PORT": port, **own}
        surroundings["OMP_NUM_THREADS"] = "1"
        ranks.append(subprocess.Popen([*prefix, *command], env=surroundings, stdout=subprocess.PIPE, text=True))
    said = [rank.communicate(timeout=900)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank has failed")
    return [json.loads(text.splitlines()[-1]) for text in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--links", default="loopback,1gbit,100mbit")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    rounds = asked.rounds or (3 if asked.quick else 7)
    if asked.rank:
        print(json.dumps(measure(asked.tokens, rounds, asked.ranks_per_host)))
        return
    over_limit: dict[str, Any] = {}
    over_minimum: dict[str, Any] = {}
    for rate in asked.links.split(","):
        if rate != LOOPBACK and not is_possible():
            print(f"{rate}: not measured: hosts need root, ip and tc")
            continue
        with link(rate) as place:
            both = on_both(place, asked.tokens, rounds, asked.ranks_per_host)
        print(f"\n{rate}, {asked.tokens} tokens a rank, hidden {HIDDEN}, float32")
        print(f"  {'':18}{'':12}{'ms':>9}{'/ limit':>9}{'MB sent':>9}{'/ minimum':>10}")
        kinds = [kind for kind in KINDS if kind in both[0][next(iter(SHAPES))]["bytes"]]
        for shape in SHAPES:
            times = [
                [max(ranks) for ranks in zip(*(rank[shape]["times"][name] for rank in both), strict=True)]
                for name in ("limit", *kinds)
            ]
            medians = dict(zip(("limit", *kinds), map(statistics.median, times), strict=True))
            minimum = both[0][shape]["minimum"]
            for name in ("limit", *kinds):
                ratio = medians[name] / medians["limit"]
                sent = minimum if name == "limit" else both[0][shape]["bytes"][name]
                over_limit.setdefault(rate, {}).setdefault(shape, {})[name] = round(ratio, 3)
                counted = ("", "") if sent is None else (f"{sent / 1e6:.2f}", f"{sent / minimum:.3f}")
                if sent is not None:
                    over_minimum.setdefault(rate, {}).setdefault(shape, {})[name] = round(sent / minimum, 4)
                print(f"  {shape:18}{name:12}{1000 * medians[name]:9.1f}{ratio:9.2f}{counted[0]:>9}{counted[1]:>10}")
    if asked.json:
        asked.json.write_text(json.dumps({"time_over_limit": over_limit, "bytes_over_minimum": over_minimum}, indent=1))


if __name__ == "__main__":
    main()
