"""Kill a real training run again and again, and see whether it ends where an undisturbed one does.

    python tools/soak.py --kills 25 --seed 1
    python tools/soak.py --kills 25 --launcher torchrun

`moe-dist train`, or `moe-dist launch torchrun`, of a tiny model, saving in the background every few steps, is
killed by SIGKILL at seeded random times: all its processes, one rank, or the launcher alone; while starting, while
training, or as soon as a save is seen on disk. It is started again until all kills are done, then finished. Checked
after every kill: the newest committed step verifies, no committed step is damaged, none that was newest is gone.
Checked at the end, against a run that nobody disturbed: the loss of every step, of every start, and the hash of
every tensor, bitwise. Exit code 1 when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.reading import CheckpointRef, whole
from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.checkpoint.tools.inspecting import digests

CONFIG = """\
model: {{vocab_size: 272, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, moe_intermediate_size: 32,
         num_experts: 4, max_position_embeddings: 32}}
data: {{source: text, path: {folder}/text/*.txt, max_seq_length: 32}}
parallel: {{ep_size: {ranks}}}
optimizer: {{learning_rate: 1.0e-3, lr_scheduler_type: constant}}
balance: {{bias_update_rate: 0.001}}
train: {{per_device_train_batch_size: 2}}
checkpoint: {{save_steps: {save_steps}, save_total_limit: 3}}
monitor: {{logging_steps: 1, progress: none, tensorboard: false}}
launch: {{nproc_per_node: {ranks}, device: cpu, num_threads: 1, timeout: 20, max_restarts: 0}}  # we start it again
"""
HOW = ("group", "group", "rank", "launcher")
STARTERS = {"local": ("train",), "torchrun": ("launch", "torchrun")}
MARK = "MOE_DIST_SOAK"
"""Variable by which every process of a run is found: torchrun gives each rank a session of its own."""
WHEN = ("training", "training", "saving", "saving", "starting")
PATIENCE = 600.0


@dataclass
class Kill:
    """One kill and what was found after it."""

    how: str
    when: str
    seconds: float
    """From start to kill."""
    reached: int
    """Last step that was logged."""
    newest: int | None
    """Newest committed step afterwards."""
    cut_short: int
    """Saves and deletions found unfinished."""
    problems: list[str] = field(default_factory=list)


class Soak:
    """One run folder and everything that happens to it."""

    def __init__(self, folder: Path, ranks: int, save_steps: int, seed: int, launcher: str) -> None:
        self.folder, self.draw, self.kills = folder, random.Random(seed), list[Kill]()
        self.starter = STARTERS[launcher]
        self.ranks, self.save_steps = ranks, save_steps
        (folder / "text").mkdir(parents=True)
        for number in range(12):
            words = " ".join(f"word{(number + 1) * place % 97}" for place in range(200))
            (folder / "text" / f"{number}.txt").write_text(words)
        self.config = folder / "run.yaml"
        self.config.write_text(CONFIG.format(folder=folder, ranks=ranks, save_steps=save_steps))
        self.run = folder / "run"
        (folder / "console.log").touch()
        self.storage = LocalStorage(self.run)

    def start(self, output: Path, steps: int) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "launcher", *self.starter, str(self.config)]
        words += [f"train.output_dir={output}", f"train.max_steps={steps}"]
        log = open(self.folder / "console.log", "ab")  # noqa: SIM115
        marked = os.environ | {MARK: str(self.folder), "GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=marked
        )

    def finish(self, output: Path, steps: int) -> None:
        process = self.start(output, steps)
        try:
            code = process.wait(20 * PATIENCE)
        finally:
            self.end(process)
        if code != 0:
            raise SystemExit(f"a run that nobody disturbed ended with {code}:\n{self.console()[-2000:]}")

    def console(self) -> str:
        return (self.folder / "console.log").read_text(errors="replace")

    def kill_once(self) -> Kill:
        """One start and its end."""
        before = self.newest()
        rows = len(losses(self.run))
        how, when = self.draw.choice(HOW), self.draw.choice(WHEN)
        share = self.draw.random()
        if how == "rank" and when == "starting":
            how = "group"  # there may be no rank yet
        began = time.monotonic()
        process = self.start(self.run, 10**6)
        try:
            if when == "starting":
                time.sleep(4 * share)
            else:
                wait(process, lambda: len(losses(self.run)) > rows, self)
                time.sleep(share)
                if when == "saving":
                    wait(process, lambda: any(self.run.glob(".checkpoint-*.tmp")), self)
                    time.sleep(0.03 * share**2)
            seconds = time.monotonic() - began
            self.strike(process, how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            left = self.wait_gone(30)
        finally:
            self.end(process)
        done = Kill(how, when, seconds, last_step(self.run), self.newest(), len(self.storage.leftovers()))
        done.problems += [f"still alive 30 s after the kill: {left}"] * bool(left)
        done.problems += self.look(before)
        self.kills.append(done)
        return done

    def strike(self, process: subprocess.Popen[bytes], how: str) -> None:
        if how == "group":
            kill(self.alive())
        elif how == "launcher":
            process.kill()
        else:
            kill([self.draw.choice(self.rank_pids(process))])

    def alive(self) -> list[int]:
        """Processes of this run, its launcher first."""
        mark, found = f"{MARK}={self.folder}\0".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if mark in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
        return sorted(found)

    def rank_pids(self, process: subprocess.Popen[bytes]) -> list[int]:
        """What `process` has started to train; before that, what starts it."""
        others = [pid for pid in self.alive() if pid != process.pid]
        return [pid for pid in others if not is_fork_server(pid)] or others

    def wait_gone(self, seconds: float) -> list[int]:
        deadline = time.monotonic() + seconds
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def end(self, process: subprocess.Popen[bytes]) -> None:
        kill(self.alive())
        process.wait(30)

    def newest(self) -> int | None:
        return max(self.storage.steps(), default=None)

    def look(self, before: int | None) -> list[str]:
        """What is wrong with the committed steps."""
        steps = self.storage.steps()
        wrong = [line for step in steps for line in whole(CheckpointRef(self.storage, step))]
        if before is not None and (not steps or max(steps) < before):
            wrong.append(f"step {before} had been committed, now there is {steps}")
        return wrong


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step of every start. A line that a kill cut in two is nobody's."""
    found = []
    with suppress(FileNotFoundError):
        for line in (run / "metrics.jsonl").read_text(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                row: dict[str, Any] = json.loads(line)
                if row["kind"] == "train":
                    found.append((row["step"], row["loss"]))
    return found


def last_step(run: Path) -> int:
    rows = losses(run)
    return rows[-1][0] if rows else 0


def wait(process: subprocess.Popen[bytes], condition: Callable[[], bool], soak: Soak) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run ended by itself or hangs:\n{soak.console()[-2000:]}")
        time.sleep(0.002)


def is_fork_server(pid: int) -> bool:
    """Ranks that it has forked, which go on without it, have names of their own."""
    try:
        command, name = Path(f"/proc/{pid}/cmdline").read_bytes(), Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return False
    return b"forkserver" in command and not name.startswith("moe-rank-")


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def compare(soak: Soak, twin: Path, last: int) -> tuple[list[str], int]:
    """How the run that was killed differs from its twin, and how many losses were compared."""
    wrong = []
    expected = dict(losses(twin))
    rows = losses(soak.run)
    for step, loss in rows:
        if expected.get(step) != loss and step <= last:
            wrong.append(f"step {step}: loss {loss!r}, undisturbed {expected.get(step)!r}")
    missing = sorted(set(expected) - {step for step, _ in rows})
    # A kill can take a line that was not yet written; the step itself is in the state that is compared below.
    if len(missing) > len(soak.kills):
        wrong.append(f"{len(missing)} steps were never logged, the first {missing[0]}")
    ours, theirs = digests(CheckpointRef(soak.storage, last)), digests(CheckpointRef(LocalStorage(twin), last))
    wrong += [
        f"{name}: not the same bits" for name in sorted(ours.keys() | theirs) if ours.get(name) != theirs.get(name)
    ]
    return wrong, len(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--launcher", default="local", choices=STARTERS)
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2, 4))
    parser.add_argument("--save-steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no more kills after this long")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    began = time.monotonic()
    try:
        soak = Soak(folder, options.ranks, options.save_steps, options.seed, options.launcher)
        print(f"{'kill':>4}  {'what':8}  {'while':8}  {'after':>6}  {'step':>5}  {'committed':>9}  {'cut short':>9}")
        while len(soak.kills) < options.kills and time.monotonic() - began < options.seconds:
            done = soak.kill_once()
            committed = "none" if done.newest is None else str(done.newest)
            print(
                f"{len(soak.kills):4}  {done.how:8}  {done.when:8}  {done.seconds:5.1f}s  {done.reached:5}  "
                f"{committed:>9}  {done.cut_short:9}  {'; '.join(done.problems) or 'ok'}",
                flush=True,
            )
        last = max(last_step(soak.run), soak.newest() or 0) + 10
        soak.finish(soak.run, last)
        twin = folder / "twin"
        soak.finish(twin, last)
        wrong, compared = compare(soak, twin, last)
        for line in wrong[:20]:
            print(line)
        wrong += [line for kill in soak.kills for line in kill.problems]
        how = Counter(kill.how for kill in soak.kills)
        again = compared - len({step for step, _ in losses(soak.run)})
        print(
            f"{len(soak.kills)} kills ({', '.join(f'{count} {name}' for name, count in sorted(how.items()))}), "
            f"{sum(bool(kill.cut_short) for kill in soak.kills)} of them with a save or deletion cut short; "
            f"{options.ranks} ranks, {last} steps, {again} computed twice, seed {options.seed}, "
            f"{time.monotonic() - began:.0f} s"
        )
        tensors = len(digests(CheckpointRef(soak.storage, last)))
        print(
            f"{compared} losses and {tensors} tensors and experts compared with the "
            f"undisturbed run: {'all bitwise equal' if not wrong else f'{len(wrong)} PROBLEMS'}"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
