"""Where is an expert? The report of hivemind's benchmark of its distributed hash table, over our experts' map.

    python tools/bench/directory.py [--quick] [--json FILE] [--num-peers 1024] [--num-experts 16384]

There every peer stores which experts it has, under a name with an expiration, and asks others for those it needs. Here
nobody is asked: which rank holds what follows from the layout, and any rank computes it (`computed`). Beside it the
same map stored with, and read from, a server that ranks have anyway (`tcp store`: torch's, one client, a local socket).

`store`: every peer says which experts it has, `--expert-batch-size` at a time; `get`: all experts in random order, as
many at a time, and the ranks that hold each. An answer is right when it names exactly the peers that have said so.
`survival`: peers of which the map knows in the end just what they hold. Mean: seconds of one expert.

Not covered: peers that fail, latency, other clients at the same time.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[2]))

from moe_dist.parallel.layout import Layout

PUBLISHED = "published by hivemind: store 0.01487 s (727.46 s in all), get 0.00664 s (108.74 s)"


@dataclass(frozen=True)
class Network:
    """`num_peers` ranks that share `num_experts` experts of one layer over `ep_size` of them."""

    num_peers: int
    num_experts: int
    ep_size: int

    @property
    def layout(self) -> Layout:
        return Layout(self.num_peers, ep_size=self.ep_size)

    def held_by(self, peer: int) -> range:
        """What a rank takes for its own when it builds its part of the model."""
        return self.layout.experts_of(self.layout.coordinates(peer)[2], self.num_experts)


class Directory(Protocol):
    """Who has which experts."""

    def declare(self, peer: int, experts: Sequence[int]) -> None:
        """This peer has these experts."""
        ...

    def find(self, experts: Sequence[int]) -> list[list[int]]:
        """The peers that have each of these experts, in ascending order."""
        ...


class Computed:
    """The arithmetic of the layout; there is nobody to tell."""

    def __init__(self, network: Network) -> None:
        self.layout, self.share = network.layout, network.num_experts // network.ep_size

    def declare(self, peer: int, experts: Sequence[int]) -> None:
        pass

    def find(self, experts: Sequence[int]) -> list[list[int]]:
        at, replicas = self.layout.rank_at, range(self.layout.edp_size)
        return [[at(0, replica, expert // self.share) for replica in replicas] for expert in experts]


class InTcpStore:
    """A key for each expert and replica, as each peer that has it writes it."""

    def __init__(self, network: Network) -> None:
        from torch.distributed import TCPStore

        patience = timedelta(seconds=60)
        self.layout = network.layout
        self.server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
        self.client = TCPStore("127.0.0.1", self.server.port, is_master=False, timeout=patience)

    def declare(self, peer: int, experts: Sequence[int]) -> None:
        _, replica, _ = self.layout.coordinates(peer)
        self.client.multi_set([f"{expert}/{replica}" for expert in experts], [str(peer)] * len(experts))

    def find(self, experts: Sequence[int]) -> list[list[int]]:
        replicas = self.layout.edp_size
        keys = [f"{expert}/{replica}" for expert in experts for replica in range(replicas)]
        peers = [int(said) for said in self.client.multi_get(keys)]
        return [peers[start : start + replicas] for start in range(0, len(peers), replicas)]


DIRECTORIES: dict[str, Callable[[Network], Directory]] = {"computed": Computed, "tcp store": InTcpStore}


def batches(values: Sequence[int], size: int) -> list[Sequence[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def measure(network: Network, directory: Directory, batch_size: int) -> dict[str, Any]:
    """Counts of successes and seconds."""
    said: dict[int, list[int]] = {expert: [] for expert in range(network.num_experts)}
    started, stored = time.perf_counter(), 0
    for peer in range(network.num_peers):
        for batch in batches(network.held_by(peer), batch_size):
            directory.declare(peer, batch)
            stored += len(batch)
            for expert in batch:
                said[expert].append(peer)
    store_seconds = time.perf_counter() - started
    asked = list(range(network.num_experts))
    random.Random(0).shuffle(asked)
    started, found = time.perf_counter(), []
    for batch in batches(asked, batch_size):
        found += directory.find(batch)
    get_seconds = time.perf_counter() - started
    right = sum(answer == said[expert] for expert, answer in zip(asked, found, strict=True))
    owners = directory.find(range(network.num_experts))
    held: dict[int, set[int]] = {}
    for expert, peers in enumerate(owners):
        for peer in peers:
            held.setdefault(peer, set()).add(expert)
    alive = sum(held.get(peer, set()) == set(network.held_by(peer)) for peer in range(network.num_peers))
    return {
        "stores": stored,
        "stores_expected": network.num_experts * network.layout.edp_size,
        "store_seconds": store_seconds,
        "gets": len(asked),
        "gets_right": right,
        "get_seconds": get_seconds,
        "survived": alive,
    }


def succeeded(found: dict[str, Any], network: Network) -> bool:
    """Whether every store, answer and peer was right."""
    return (
        found["stores"] == found["stores_expected"]
        and found["gets_right"] == found["gets"]
        and found["survived"] == network.num_peers
    )


def report(name: str, found: dict[str, Any], network: Network) -> str:
    stores, gets, peers = found["stores"], found["gets"], network.num_peers
    return "\n".join(
        [
            f"{name}",
            f"  store    {stores / found['stores_expected']:.1%} ({stores:,}/{found['stores_expected']:,}), "
            f"mean {found['store_seconds'] / stores:.3g} s, total {found['store_seconds']:.3g} s",
            f"  get      {found['gets_right'] / gets:.1%} ({found['gets_right']:,}/{gets:,}), "
            f"mean {found['get_seconds'] / gets:.3g} s, total {found['get_seconds']:.3g} s",
            f"  survival {found['survived'] / peers:.1%} ({found['survived']:,}/{peers:,})",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 peers and 1,024 experts")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--num-peers", type=int)
    parser.add_argument("--num-experts", type=int)
    parser.add_argument("--ep-size", type=int, help="peers that share out the experts; default: a quarter of them")
    parser.add_argument("--expert-batch-size", type=int, default=64)
    asked = parser.parse_args()
    num_peers = asked.num_peers or (64 if asked.quick else 1024)
    num_experts = asked.num_experts or (1024 if asked.quick else 16384)
    network = Network(num_peers, num_experts, asked.ep_size or max(1, num_peers // 4))
    print(
        f"{num_experts:,} experts on {num_peers:,} peers, each on {network.layout.edp_size}; "
        f"{asked.expert_batch_size} at a time"
    )
    found = {}
    for name, make in DIRECTORIES.items():
        found[name] = measure(network, make(network), asked.expert_batch_size)
        print(report(name, found[name], network), flush=True)
    print(PUBLISHED)
    wrong = [name for name, one in found.items() if not succeeded(one, network)]
    status = f"Failure: {', '.join(wrong)}" if wrong else "Success"
    if asked.json:
        sizes = {"num_peers": num_peers, "num_experts": num_experts, "ep_size": network.ep_size}
        asked.json.write_text(json.dumps({"status": status, **sizes, "directories": found}, indent=1))
    print(f"status:{status}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
