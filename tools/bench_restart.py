"""Seconds from the death of a rank to the first new training step, and whether the first try was clean.

    python tools/bench_restart.py --tries 100 --seed 1

`moe-dist launch local` and `launch torchrun` train a tiny model, saving every few steps. A random rank is killed with
SIGKILL at a random time, again and again in the same run; nothing is done to help it. A try is clean when exactly one
start follows and trains. Where the time goes: `notice` until the launcher has said what happened (the other ranks have
ended by then), `start` until the first new rank exists, `load` until the run is announced (imports, meeting, data,
checkpoint, model), `step` until the first new step is logged. mpirun starts nothing again. Exit code 1 when a try was
not clean.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

CONFIG = """\
model: {{vocab_size: 272, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, moe_intermediate_size: 32,
         num_experts: 4, max_position_embeddings: 32}}
data: {{source: text, path: {folder}/text/*.txt, max_seq_length: 32}}
parallel: {{ep_size: {ranks}}}
train: {{per_device_train_batch_size: 2, max_steps: 1000000, output_dir: {folder}/run}}
checkpoint: {{save_steps: 10, save_total_limit: 2}}
monitor: {{logging_steps: 1, progress: none, tensorboard: false}}
launch: {{nproc_per_node: {ranks}, device: cpu, num_threads: 1, max_restarts: 3}}
"""
PATIENCE = 120.0
"""Seconds after which a run counts as hung."""
PARTS = ("notice", "start", "load", "step")


class Try(NamedTuple):
    """Seconds after the kill of each milestone of PARTS, and how many starts there were."""

    moments: tuple[float, ...]
    starts: int


class Launched:
    """A run and what can be seen of it from outside."""

    def __init__(self, launcher: str, folder: Path, ranks: int) -> None:
        (folder / "text").mkdir(parents=True)
        for number in range(8):
            words = " ".join(f"word{(number + 1) * place % 97}" for place in range(400))
            (folder / "text" / f"{number}.txt").write_text(words)
        (folder / "run.yaml").write_text(CONFIG.format(folder=folder, ranks=ranks))
        self.metrics = folder / "run/metrics.jsonl"
        self.said: list[str] = []
        self.counts = {"run": 0, "train": 0}
        self._read = 0
        command = [sys.executable, "-m", "launcher", "launch", launcher, str(folder / "run.yaml")]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)

    def look(self) -> dict[str, int]:
        """Rows of each kind in metrics.jsonl so far."""
        with suppress(FileNotFoundError), self.metrics.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._read += len(whole) + 1
                for line in whole.split(b"\n"):
                    with suppress(ValueError):  # the half line of a rank that was killed
                        kind = json.loads(line)["kind"]
                        self.counts[kind] = self.counts.get(kind, 0) + 1
        return self.counts

    @property
    def errors(self) -> int:
        return sum(line.startswith("moe-dist: error") for line in self.said)

    @property
    def ranks(self) -> list[int]:
        """Process ids of the ranks, by rank: children of the launcher."""
        found = {}
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            with suppress(OSError):
                for pid in task.read_text().split():
                    for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                        if item.startswith(b"RANK="):
                            found[int(item[5:])] = int(pid)
                    name = Path(f"/proc/{pid}/comm").read_text().strip()
                    if name.startswith("moe-rank-"):  # forked: its environment is where only it can see it
                        found[int(name[9:])] = int(pid)
        return [found[rank] for rank in sorted(found)]

    def until(self, condition: Callable[[], bool]) -> float:
        """The moment at which it holds. Raises TimeoutError when it never does."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise TimeoutError(f"hung, or ended with {self.process.poll()}: {''.join(self.said[-3:])}")
            time.sleep(0.01)
        return time.monotonic()

    def kill_one(self, chance: random.Random) -> Try:
        """Kill a rank at a random time; wait for the next step."""
        time.sleep(chance.uniform(0.3, 2.0))
        before = dict(self.look())
        errors, ranks = self.errors, self.ranks
        os.kill(chance.choice(ranks), signal.SIGKILL)
        killed = time.monotonic()
        moments = [
            self.until(lambda: self.errors > errors),
            self.until(lambda: bool(set(self.ranks) - set(ranks))),
            self.until(lambda: self.look()["run"] > before["run"]),
        ]
        steps = self.counts["train"]
        moments.append(self.until(lambda: self.look()["train"] > steps))
        starts = max(self.counts["run"] - before["run"], self.errors - errors)
        return Try(tuple(moment - killed for moment in moments), starts)

    def stop(self) -> None:
        for pid in [*self.ranks, self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def bench(launcher: str, tries: int, seed: int, ranks: int) -> tuple[list[Try], str]:
    """Tries that came to an end, and what went wrong with the one that did not."""
    chance, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        run = Launched(launcher, Path(folder) / launcher, ranks)
        try:
            run.until(lambda: run.look()["train"] > 0)
            for _ in range(tries):
                found.append(run.kill_one(chance))
        except TimeoutError as error:
            return found, str(error)
        finally:
            run.stop()
    return found, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launchers", default="local,torchrun")
    options = parser.parse_args()
    clean = True
    head = f"{'launcher':<9} {'tries':>5} {'first try':>9} {'median':>7} {'p95':>6} {'max':>6}"
    print(f"{head}   of the median: {', '.join(PARTS)}")
    for launcher in options.launchers.split(","):
        tries, wrong = bench(launcher, options.tries, options.seed, options.ranks)
        first = sum(one.starts == 1 for one in tries)
        clean = clean and first == options.tries
        totals = sorted(one.moments[-1] for one in tries) or [float("nan")]
        p95 = totals[min(len(totals) - 1, int(0.95 * len(totals)))]
        spent = [[b - a for a, b in zip((0.0, *one.moments[:-1]), one.moments, strict=True)] for one in tries]
        parts = [statistics.median(column) for column in zip(*spent, strict=True)] if spent else []
        print(
            f"{launcher:<9} {options.tries:>5} {first:>5}/{options.tries:<3} {statistics.median(totals):>6.1f}s "
            f"{p95:>5.1f}s {totals[-1]:>5.1f}s   {', '.join(f'{part:.1f}' for part in parts)}  {wrong}",
            flush=True,
        )
    load = os.getloadavg()[1]
    print(f"{options.ranks} ranks, {len(os.sched_getaffinity(0))} cores, load {load:.1f}, seed {options.seed}")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
