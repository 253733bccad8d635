"""What all of monitoring costs a real step: two ranks train, with everything on and with everything off in turn.

    python tools/bench/monitor_ranks.py [--layers 16] [--experts 8] [--rounds 10] [--logging-steps 10]

One process group, one model: blocks of `--logging-steps` steps go by in pairs, on and off in alternating order, so that
whatever else the machine does falls on both. On is what `moe-dist train` does: counts in the layers, phases, clock,
rows of all ranks and their reduction, diagnosis, JSONL, TensorBoard, a plain console, the Prometheus server (not
scraped), and a watchdog. Off is none of it. Wall-clock seconds of rank 0 from barrier to barrier; starting and ending a
watchdog is outside of them. The difference is the median of the pairs, with its quartiles: where these have different
signs, the machine was too busy for an answer.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

from launcher.connect.environment import detect
from launcher.connect.process_groups import connected
from launcher.supervise.watchdog import Watchdog
from moe_dist.config import load_mapping
from moe_dist.train import MoETrainer

NUM_RANKS = 2
WARM_UP = 1
"""Pairs that do not count."""


class InTurn(MoETrainer):
    """Trains in blocks, with and without monitoring; `seconds` of each block that was on, and of its neighbour."""

    def __init__(self, *arguments: Any, watchdog: Any, block: int, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.watchdog, self.block = watchdog, block
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.facts: dict[int, Any] = {}
        self.is_on, self.began, self.watching = True, 0.0, None

    def _one_step(self) -> None:
        done = self.parts.counters.step
        if done % self.block == 0:
            number = done // self.block
            if number == 0:
                self.all, self.facts, self.watching = self.callbacks.own, self.parts.balancer.facts, self.watchdog()
            self._switch(number % 4 in (0, 3))  # on off off on: a drift of the machine cancels
            self.mesh.barrier()
            self.began = time.perf_counter()
        super()._one_step()
        if self.parts.counters.step % self.block == 0:
            self.mesh.barrier()
            self.seconds[self.is_on].append((time.perf_counter() - self.began) / self.block)

    def _switch(self, on: bool) -> None:
        if on is self.is_on:
            return
        self.is_on = on
        self.callbacks.own = [one for one in self.all if on or one not in (self.parts.reporter, self.parts.acting)]
        self.parts.clock._stopped = not on
        for layer, moe in self.parts.balancer.layers.items():
            moe.balance.facts = self.facts[layer] if on else None
        if on:
            del self.status._set  # the method of its class again
            self.watching = self.watchdog()
            self.parts.reporter.on_run_begin(self.state())
        else:
            self.status._set = lambda *_: None  # type: ignore[method-assign]
            self.watching.close("done")

    def _finish(self) -> Any:
        self._switch(True)
        self.watching.close("done")
        return super()._finish()


def rank(number: int, port: int, folder: str, wanted: argparse.Namespace) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(NUM_RANKS)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(NUM_RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    config = load_mapping(
        {
            "model": {
                "vocab_size": 272, "hidden_size": wanted.hidden, "num_hidden_layers": wanted.layers,
                "num_attention_heads": 4, "moe_intermediate_size": wanted.hidden, "num_experts": wanted.experts,
            },
            "data": {"source": "stdlib", "max_seq_length": 256, "limit": 400, "validation_split": 0.0},
            "parallel": {"ep_size": NUM_RANKS},
            "train": {
                "output_dir": f"{folder}/run", "per_device_train_batch_size": 4,
                "max_steps": 2 * wanted.logging_steps * (WARM_UP + wanted.rounds),
            },
            "checkpoint": {"save_at_end": False},
            "monitor": {"logging_steps": wanted.logging_steps, "progress": "plain", "prometheus": {"port": 0}},
            "launch": {"device": "cpu"},
        }
    )  # fmt: skip
    environment = detect()
    with connected(config, environment) as mesh, contextlib.redirect_stdout(io.StringIO()):
        trainer = InTurn(config, mesh=mesh, watchdog=None, block=wanted.logging_steps)
        trainer.watchdog = lambda: Watchdog(config, environment, mesh, trainer.status)
        trainer.train()
        found = {name: trainer.seconds[on][WARM_UP:] for name, on in (("on", True), ("off", False))}
    if number == 0:
        extra = [100 * (on / off - 1) for on, off in zip(found["on"], found["off"], strict=True)]
        low, middle, high = statistics.quantiles(extra, n=4)
        medians = ", ".join(f"{name} {1e3 * statistics.median(values):.2f} ms" for name, values in found.items())
        print(f"{wanted.layers} x {wanted.experts} on {NUM_RANKS} ranks, logged every {wanted.logging_steps} steps")
        spread = f"quartiles {low:+.2f} to {high:+.2f}, {len(extra)} pairs"
        print(f"  a step: {medians}; monitoring: {middle:+.2f} % ({spread})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=64, help="width of the model and of its experts")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of blocks")
    parser.add_argument("--logging-steps", type=int, default=10, help="monitor.logging_steps, and steps of a block")
    wanted = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(rank, (port, str(Path(folder)), wanted), nprocs=NUM_RANKS)


if __name__ == "__main__":
    main()
