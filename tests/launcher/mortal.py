"""A run that dies where it is told to, and its comparison with one left alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from programs import Program, metrics

from moe_dist.checkpoint.reading import CheckpointRef
from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.checkpoint.tools.inspecting import digests

MODULE = '''
import json
import os
import signal
import time

from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.models.attention import Attention
from moe_dist.models.experts import Experts
from moe_dist.parallel import row_exchange
from moe_dist.parallel.engines.replicated import ReplicatedEngine

happened = os.environ["DEATHS_HAPPENED"]  # a file with a byte for each
done = os.path.getsize(happened) if os.path.exists(happened) else 0
place, call, rank = (json.loads(os.environ["DEATHS"])[done:] or [("nowhere", 0, 0)])[0]
calls = 0


def die():
    global calls
    calls += 1
    if calls == call and os.environ["RANK"] == str(rank):
        with open(happened, "ab") as file:
            file.write(b".")
        os.kill(os.getpid(), signal.Signals[os.environ.get("DEATHS_BY", "SIGKILL")])


def spoil(owner, name):
    exact = getattr(owner, name)

    def spoiled(*arguments, **options):
        die()
        return exact(*arguments, **options)

    setattr(owner, name, spoiled)


if place == "optimizer":
    spoil(ReplicatedEngine, "step")
elif place == "reduction":
    spoil(ReplicatedEngine, "reduce")
elif place == "attention":
    spoil(Attention, "forward")
elif place == "backward":
    backward = row_exchange.Arrive.backward
    row_exchange.Arrive.backward = staticmethod(lambda ctx, *grads: (die(), backward(ctx, *grads))[1])


write = LocalStorage.write


def write_slowly(*arguments):
    """A disk that takes its time, once."""
    LocalStorage.write = write
    time.sleep(float(os.environ["SLOW_DISK"]))
    write(*arguments)


if "SLOW_DISK" in os.environ and not done:
    LocalStorage.write = write_slowly


class Mortal(Experts):
    """Between the two all-to-alls of a layer."""

    def forward(self, rows, rows_per_expert):
        if place == "experts" and self.training:
            die()
        return super().forward(rows, rows_per_expert)
'''
PLANTED = '''
import os
import time

import torch
import torch.distributed as dist
from moe_dist.models.experts import Experts

RANK, WHAT = os.environ["RANK"], os.environ.get("PLANTED", "")


class Planted(Experts):
    """In step 4, on rank 1, once: an endless loop, or a collective that nobody else calls."""

    calls = 0

    def forward(self, rows, counts):
        self.calls += self.training
        if self.calls == 4 and self.training:
            while WHAT == "loop" and RANK == "1":
                pass
            if WHAT == "other" and RANK == "1":
                dist.all_reduce(torch.zeros(1))
            if WHAT == "shape":
                dist.all_to_all_single(torch.zeros(2 + 2 * int(RANK)), torch.zeros(2 + 2 * int(RANK)))
        time.sleep(0.05)
        return super().forward(rows, counts)
'''
"""A module whose experts, in their fourth step, do what the variable of that name says."""
OPTIONS = ("checkpoint.save_steps=2", "train.max_steps=7")
TORCHRUN = ("moe-dist", "launch", "torchrun")
Death = tuple[str, int, int]
"""Place, how manieth time a rank comes there since it was started (layers count), rank."""


def start(
    config: Path,
    folder: Path,
    deaths: Sequence[Death],
    *options: str,
    starter: Sequence[str] = ("moe-dist", "train"),
    **environment: str,
) -> Program:
    """A run in folder/run; each start after a death dies the next one."""
    (folder / "mortal.py").write_text(MODULE)
    environment["DEATHS"] = json.dumps(deaths)
    environment["DEATHS_HAPPENED"] = str(folder / "deaths")
    own = ("model.expert=mortal:Mortal", *OPTIONS, f"train.output_dir={folder / 'run'}")
    return Program(*starter, config, *own, *options, PYTHONPATH=str(folder), OMP_NUM_THREADS="1", **environment)


def is_the_same(folder: Path, twin: Path) -> None:
    """Every step's loss, and every weight, moment and bias at the end, bit for bit."""
    ours = {row["step"]: row["loss"] for row in metrics(folder, "train")}
    assert ours == {row["step"]: row["loss"] for row in metrics(twin, "train")}
    assert digests(CheckpointRef(LocalStorage(folder), 7)) == digests(CheckpointRef(LocalStorage(twin), 7))


def errors(program: Program) -> list[str]:
    """What was said to be wrong."""
    return [line for line in program.err.splitlines() if line.startswith("moe-dist: error")]
