"""A rank is lost, again and again or for good: the run goes on by itself and computes what it would have."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from programs import Program, metrics

from moe_dist.checkpoint.inspecting import digests
from moe_dist.checkpoint.reading import Found
from moe_dist.checkpoint.storage import LocalStorage

pytestmark = pytest.mark.dist

DYING = '''
import os
import signal

from moe_dist.models.experts import Experts
from moe_dist.parallel import dispatch
from moe_dist.parallel.gradients import Gradients
from moe_dist.train.optimizer import Optimizer

WHERE, STEP, RANK = os.environ["DIE_IN"], int(os.environ["DIE_AT"]), os.environ["DIE_RANK"]
once = os.environ["DIE_ONCE"]  # made at the first death, which so is the only one; "": again and again
calls = 0


def die():
    global calls
    calls += 1
    if calls == STEP and os.environ["RANK"] == RANK and not os.path.exists(once):
        if once:
            open(once, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)


def spoil(owner, name):
    exact = getattr(owner, name)

    def spoiled(*arguments, **options):
        die()
        return exact(*arguments, **options)

    setattr(owner, name, spoiled)


if WHERE == "optimizer":
    spoil(Optimizer, "step")
elif WHERE == "reduction":
    spoil(Gradients, "reduce")
elif WHERE == "backward":
    backward = dispatch._AllToAll.backward
    dispatch._AllToAll.backward = staticmethod(lambda ctx, *grads: (die(), backward(ctx, *grads))[1])


class Mortal(Experts):
    """Between the two all-to-alls of a layer."""

    def forward(self, rows, rows_per_expert):
        if WHERE == "experts" and self.training:
            die()
        return super().forward(rows, rows_per_expert)
'''
OPTIONS = ("checkpoint.save_steps=2", "train.max_steps=7")


@pytest.fixture(scope="module")
def twin(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, left alone."""
    folder = tmp_path_factory.mktemp("twin")
    program = start(config, folder, "nowhere", 1, 0, folder / "never")
    assert program.end() == 0, program.err
    return folder / "run"


def start(config: Path, folder: Path, where: str, at: int, rank: int, once: Path | str, *options: str) -> Program:
    (folder / "mortal.py").write_text(DYING)
    command = ("moe-dist", "train", config, "model.expert=mortal:Mortal", *OPTIONS, *options)
    environment = {"DIE_IN": where, "DIE_AT": str(at), "DIE_RANK": str(rank), "DIE_ONCE": str(once)}
    return Program(*command, f"train.output_dir={folder / 'run'}", PYTHONPATH=str(folder), **environment)


def is_the_same(folder: Path, twin: Path) -> None:
    """Every step's loss, and every weight, moment and bias at the end, bit for bit."""
    ours = {row["step"]: row["loss"] for row in metrics(folder, "train")}
    assert ours == {row["step"]: row["loss"] for row in metrics(twin, "train")}
    assert digests(Found(LocalStorage(folder), 7)) == digests(Found(LocalStorage(twin), 7))


@pytest.mark.parametrize(
    ("where", "at", "rank", "phase"),
    [
        ("experts", 9, 1, "computing"),  # two layers a step: in step 5
        ("optimizer", 5, 0, "updating weights"),
        pytest.param("backward", 18, 0, r"the all-to-all of layer \d|computing", marks=pytest.mark.slow),
        pytest.param("reduction", 5, 1, "reducing gradients", marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_costs_a_few_steps(
    config: Path, tmp_path: Path, twin: Path, where: str, at: int, rank: int, phase: str
) -> None:
    """FAULTS row 1: one line names rank, signal, step and phase; the run starts again by itself, loses at most one
    checkpoint interval, and ends bitwise as its twin."""
    program = start(config, tmp_path, where, at, rank, tmp_path / "once")
    assert program.end() == 0
    (line,) = (line for line in program.err.splitlines() if line.startswith("moe-dist: error"))
    said = rf"moe-dist: error: rank {rank} \(pid \d+\) was ended by SIGKILL in step [45], ({phase}), .*"
    # The save of step 4 may still have been on its way.
    assert re.fullmatch(said + r"starting again from checkpoint-[24] \(try 1 of 3\); log: .*", line), line
    assert "resumed from" in program.out
    is_the_same(tmp_path / "run", twin)


def test_the_same_crash_again_and_again(config: Path, tmp_path: Path) -> None:
    """FAULTS row 20."""
    options = ("launch.max_restarts=2", "checkpoint.background=false")
    program = start(config, tmp_path, "optimizer", 3, 0, "", *options)
    assert program.end() == 1
    errors = [line for line in program.err.splitlines() if "error" in line]
    assert len(errors) == 4, errors
    assert "starting again from checkpoint-2 (try 1 of 2)" in errors[0]
    assert "starting again from checkpoint-2 (try 2 of 2)" in errors[1]
    assert errors[3].endswith("3 starts in a row have ended like this without getting past step 2; giving up")


def test_nothing_to_go_on_from_nothing_started_again(config: Path, tmp_path: Path) -> None:
    program = start(config, tmp_path, "optimizer", 4, 0, tmp_path / "never", "checkpoint.save_steps=0")
    assert program.end() == 1
    assert "starting again" not in program.err


def test_a_stopped_rank_is_found_and_named(config: Path, tmp_path: Path) -> None:
    """FAULTS row 10: not after the half hour of the collective library but after `monitor.stall_timeout`; the stacks
    of all ranks that can still write are in their logs, and the run goes on without the stopped process."""
    program = start(
        config, tmp_path, "nowhere", 1, 0, tmp_path / "no", "train.max_steps=400", "monitor.stall_timeout=3"
    )
    program.wait_for("step: 5/")
    victim = program.ranks()[1]
    os.kill(victim, signal.SIGSTOP)
    sent = time.monotonic()
    program.wait_until(lambda: "error" in program.err, "an error")
    assert time.monotonic() - sent < 10
    (line,) = program.err.splitlines()
    assert line.startswith(f"moe-dist: error: rank 1 (pid {victim}) has not moved for ")
    assert "it is stopped (SIGSTOP)" in line
    assert "starting again from checkpoint-" in line
    assert "most recent call first" in (tmp_path / "run" / "train.log").read_text()
    program.wait_for("resumed from")
    program.stop()


def test_a_rank_in_an_endless_loop_is_found_and_named(config: Path, tmp_path: Path) -> None:
    """The others wait in a collective; the one that does not is the one. Its stack shows the loop."""
    (tmp_path / "looping.py").write_text(
        "import os\nfrom moe_dist.models.experts import Experts\n\n\nclass Looping(Experts):\n    calls = 0\n\n"
        "    def forward(self, rows, counts):\n        self.calls += self.training\n"
        "        while self.calls == 4 and os.environ['RANK'] == '1':\n            pass\n"
        "        return super().forward(rows, counts)\n"
    )
    ours = ("model.expert=looping:Looping", f"train.output_dir={tmp_path / 'run'}", "monitor.stall_timeout=3")
    program = Program("moe-dist", "train", config, *ours, "train.max_steps=9", PYTHONPATH=str(tmp_path))
    assert program.end() == 1
    (line,) = program.err.splitlines()
    assert re.match(
        r"moe-dist: error: rank 1 \(pid \d+\) has not moved for \d+ s, in step 4, computing: its Python", line
    )
    assert 'looping.py", line 10 in forward' in (tmp_path / "run" / "logs" / "rank-1.log").read_text()


@pytest.mark.slow
def test_suspended_as_a_whole(config: Path, tmp_path: Path) -> None:
    """Ctrl-Z, and on again after longer than the limit. Seen to fail without `went_on` in the launcher."""
    program = start(config, tmp_path, "nowhere", 1, 0, "", "train.max_steps=60", "monitor.stall_timeout=3")
    program.wait_for("step: 5/")
    everybody = program.processes()
    for number, seconds in ((signal.SIGSTOP, 6), (signal.SIGCONT, 0)):
        for pid in everybody:
            os.kill(pid, number)
        time.sleep(seconds)
    assert program.end() == 0
    assert "error" not in program.err


@pytest.mark.slow
def test_killed_at_random(config: Path, tmp_path: Path, twin: Path) -> None:
    """FAULTS row 2 and 4: the launcher or a rank, killed at any time; started again until it is done."""
    chance, kills = random.Random(7), 0
    while True:
        program = start(config, tmp_path, "nowhere", 1, 0, tmp_path / "never")
        deadline = time.monotonic() + chance.uniform(1.0, 6.0)
        while program.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if program.process.poll() is not None or kills == 6:
            break
        victims = [program.pid, *program.ranks().values()]
        os.kill(chance.choice(victims) if kills % 2 else program.pid, signal.SIGKILL)
        kills += 1
        if kills % 2:
            program.gone_within(10)
        else:
            program.stop()
    assert program.end() == 0
    assert kills >= 2
    is_the_same(tmp_path / "run", twin)
