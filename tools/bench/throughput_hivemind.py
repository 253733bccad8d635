"""hivemind's side of `throughput.py`, for the Python of an environment that has it: tasks in, lines of JSON out.

A server with its feed-forward experts, and clients as processes of their own, which send their batches to experts one
by one as its own benchmark does. `one K`: K batches of every client, each whole to one expert. `routed K`: rows of a
batch go to the expert that a random router has chosen for each, and come back into their places.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import Any

import torch


def client(arguments: argparse.Namespace, peers: list[str], server: str, number: int, tasks: Any, done: Any) -> None:
    """Answer each task with None, or with what went wrong."""
    from hivemind import DHT
    from hivemind.moe.client.expert import create_remote_experts
    from hivemind.moe.expert_uid import ExpertInfo
    from hivemind.p2p import PeerID

    torch.set_num_threads(1)
    torch.manual_seed(number)
    dht = DHT(initial_peers=peers, client_mode=True, start=True)
    infos = [ExpertInfo(f"expert.{i}", PeerID.from_base58(server)) for i in range(arguments.experts)]
    experts = create_remote_experts(infos, dht)
    done.put(None)
    while (task := tasks.get()) is not None:
        kind, count = task
        try:
            for _ in range(count):
                rows = torch.randn(arguments.batch, arguments.hidden, requires_grad=arguments.backward)
                if kind == "one":
                    out = experts[int(torch.randint(len(experts), ()))](rows)
                else:
                    chosen = torch.randint(len(experts), (len(rows),))
                    places = [(chosen == i).nonzero()[:, 0] for i in range(len(experts))]
                    parts = [expert(rows[place]) for expert, place in zip(experts, places, strict=True)]
                    out = torch.zeros_like(rows).index_copy(0, torch.cat(places), torch.cat(parts))
                if arguments.backward:
                    out.sum().backward()
                assert torch.isfinite(out).all()
            done.put(None)
        except Exception as error:
            done.put(f"{type(error).__name__}: {error}")
    dht.shutdown()


def go_with(parent: int) -> None:
    """When who has started this has gone, so does everything that hivemind has started here."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("experts", "hidden", "batch", "clients"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--backward", action="store_true")
    arguments = parser.parse_args()
    if os.getpgid(0) == os.getpid():  # of its own, as throughput.py starts it
        threading.Thread(target=go_with, args=(os.getppid(),), daemon=True).start()
    import hivemind
    from hivemind.moe.server import Server

    started = time.perf_counter()
    server = Server.create(
        expert_uids=[f"expert.{i}" for i in range(arguments.experts)],
        expert_cls="ffn",
        hidden_dim=arguments.hidden,
        num_handlers=max(1, arguments.clients // 2),
        max_batch_size=arguments.batch * 4,
        device="cpu",
        start=True,
    )
    startup = time.perf_counter() - started
    context = multiprocessing.get_context("spawn")
    tasks, done = context.Queue(), context.Queue()
    address = ([str(a) for a in server.dht.get_visible_maddrs()], str(server.dht.peer_id))
    clients = [
        context.Process(target=client, args=(arguments, *address, i, tasks, done)) for i in range(arguments.clients)
    ]
    for process in clients:
        process.start()
    for _ in clients:
        done.get(timeout=120)
    print(json.dumps({"startup": startup, "version": hivemind.__version__}), flush=True)
    failed = False
    for line in sys.stdin:
        kind, count = line.split()
        started = time.perf_counter()
        for _ in clients:
            tasks.put((kind, int(count)))
        wrong = [told for _ in clients if (told := done.get(timeout=300)) is not None]
        failed |= bool(wrong)
        print(json.dumps({"seconds": time.perf_counter() - started, "wrong": wrong}), flush=True)
    for _ in clients:
        tasks.put(None)
    for process in clients:
        process.join(20)
    server.shutdown()
    return int(failed or any(process.exitcode for process in clients))


if __name__ == "__main__":
    sys.exit(main())
