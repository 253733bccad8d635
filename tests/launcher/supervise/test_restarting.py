"""A rank is lost, again and again or for good: the run goes on by itself and computes what it would have."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from mortal import TORCHRUN, Death, errors, is_the_same, start
from programs import Program

pytestmark = [pytest.mark.dist, pytest.mark.slow]

DEATHS: list[tuple[Death, str]] = [
    (("attention", 3, 1), "computing"),  # two layers a step, three ways back in each: in the second step of each start
    (("experts", 4, 0), "computing"),
    (("backward", 8, 1), r"the all-to-all of layer \d|computing"),
    (("reduction", 2, 0), "reducing gradients"),
]


@pytest.mark.parametrize(
    ("place", "at", "rank", "phase"), [("experts", 9, 1, "computing"), ("optimizer", 5, 0, "updating weights")]
)
def test_a_killed_rank_costs_a_few_steps(
    config: Path, tmp_path: Path, twin: Path, place: str, at: int, rank: int, phase: str
) -> None:
    """FAULTS row 1: one line names rank, signal, step and phase; the run starts again by itself, loses at most one
    checkpoint interval, and ends bitwise as its twin. Also when the first start was told to begin afresh."""
    program = start(config, tmp_path, [(place, at, rank)], f"checkpoint.resume={'never' if rank else 'auto'}")
    assert program.end() == 0
    (line,) = errors(program)
    said = rf"moe-dist: error: rank {rank} \(pid \d+\) was ended by SIGKILL in step [45], ({phase}), .*"
    # The save of step 4 may still have been on its way.
    assert re.fullmatch(said + r"starting again from checkpoint-[24] \(try 1 of 3\); log: .*", line), line
    assert "resumed from" in program.out
    is_the_same(tmp_path / "run", twin)


@pytest.mark.launch
@pytest.mark.parametrize("starter", [("moe-dist", "train"), TORCHRUN], ids=["local", "torchrun"])
def test_killed_in_every_phase_one_after_another(
    config: Path, tmp_path: Path, twin: Path, starter: tuple[str, ...]
) -> None:
    """FAULTS row 1, every start at its first try: a line for each death, and the twin's losses and weights."""
    options = ("launch.max_restarts=4", "checkpoint.background=false")
    program = start(config, tmp_path, [death for death, _ in DEATHS], *options, starter=starter)
    assert program.end() == 0, program.err
    for line, ((_, _, rank), phase) in zip(errors(program), DEATHS, strict=True):
        said = rf"moe-dist: error: rank {rank} \(pid \d+\) was ended by SIGKILL in step 2, ({phase}), .*"
        assert re.fullmatch(said + r"starting again at the beginning \(try \d of 4\); log: .*", line), line
    is_the_same(tmp_path / "run", twin)


@pytest.mark.parametrize("starter", [("moe-dist", "train"), pytest.param(TORCHRUN, marks=pytest.mark.launch)])
def test_the_same_crash_again_and_again(config: Path, tmp_path: Path, starter: tuple[str, ...]) -> None:
    """FAULTS row 20."""
    options = ("launch.max_restarts=2", "checkpoint.background=false", "checkpoint.resume=never")
    deaths = [("optimizer", 3, 0), *[("optimizer", 1, 0)] * 2]  # always in step 3
    program = start(config, tmp_path, deaths, *options, starter=starter)
    assert program.end() == (137 if starter == TORCHRUN else 1)
    said = errors(program)
    assert len(said) == 4, said
    assert "starting again from checkpoint-2 (try 1 of 2)" in said[0]
    assert "starting again from checkpoint-2 (try 2 of 2)" in said[1]
    assert said[3].endswith("3 starts in a row have ended like this without getting past step 2; giving up")
    assert [path.name for path in tmp_path.glob("run*")] == ["run"], "moved aside by a start that was not the first"


def test_nothing_to_go_on_from_nothing_started_again(config: Path, tmp_path: Path) -> None:
    program = start(config, tmp_path, [("optimizer", 4, 0)], "checkpoint.save_steps=0")
    assert program.end() == 1
    assert "starting again" not in program.err


def test_a_stopped_rank_is_found_and_named_and_a_slow_disk_is_not(config: Path, tmp_path: Path, twin: Path) -> None:
    """FAULTS row 10: not after the half hour of the collective library but after `monitor.stall_timeout`; the stacks
    of all ranks are in their logs, and the run goes on without the stopped process, to the end of its twin. A save
    that training waits for may take longer than that.

    Seen to fail with a save that had the limit of any other phase (killed in that of step 2), and with the stopped rank
    not continued for its stack."""
    options = ("monitor.stall_timeout=3", "checkpoint.background=false")
    program = start(config, tmp_path, [("attention", 7, 1)], *options, DEATHS_BY="SIGSTOP", SLOW_DISK="7")
    assert program.end() == 0, program.err
    (line,) = errors(program)
    assert re.match(
        r"moe-dist: error: rank 1 \(pid \d+\) has not moved for [3-9] s, in step 4, [^;]*last collectives world [^;]*: "
        r"it is stopped \(SIGSTOP\).*; starting again from checkpoint-2 ",
        line,
    ), line
    for log in ("train.log", "logs/rank-1.log"):
        assert "most recent call first" in (tmp_path / "run" / log).read_text(), log
    is_the_same(tmp_path / "run", twin)


LOOPING = """
import os
from moe_dist.data.loader import GlobalLoader
from moe_dist.models.experts import Experts as Looping


def loop_in(owner, name, call):
    exact, calls = getattr(owner, name), 0

    def looping(*arguments):
        nonlocal calls
        calls += 1
        while calls == call and os.environ["RANK"] == "1":
            pass
        return exact(*arguments)

    setattr(owner, name, looping)


"""


@pytest.mark.parametrize(
    ("where", "phase"),
    [
        ("Looping, 'forward', 7", "computing"),
        ("GlobalLoader, 'next_step', 4", "waiting for data"),
    ],
    ids=["experts", "data"],
)
def test_a_rank_in_an_endless_loop_is_found_and_named(config: Path, tmp_path: Path, where: str, phase: str) -> None:
    """The others wait in a collective, here those of sharded parameters, which are in no phase of their own; the one
    that does not is the one. Its stack shows the loop. Also where it reads data.

    Seen to fail without what the ranks tell of their collectives: all of them were named."""
    (tmp_path / "looping.py").write_text(LOOPING + f"loop_in({where})\n")
    ours = [f"train.output_dir={tmp_path / 'run'}", "monitor.stall_timeout=3", "train.max_steps=9"]
    ours += ["model.expert=looping:Looping", "parallel.ep_size=1", "parallel.zero_stage=3"]
    program = Program("moe-dist", "train", config, *ours, PYTHONPATH=str(tmp_path))
    assert program.end() == 1
    (line,) = program.err.splitlines()
    assert re.match(
        r"moe-dist: error: rank 1 \(pid \d+\) has not moved for \d+ s, in step 4, "
        rf"{phase}, last collectives [^;]*: its Python",
        line,
    ), line
    assert 'looping.py", line 13 in looping' in (tmp_path / "run" / "logs" / "rank-1.log").read_text()


def test_suspended_as_a_whole(config: Path, tmp_path: Path) -> None:
    """Ctrl-Z, and on again after longer than the limit. Seen to fail without `went_on` in the launcher."""
    program = start(config, tmp_path, [], "train.max_steps=60", "monitor.stall_timeout=3")
    program.wait_for("step: 5/")
    everybody = program.processes()
    for number, seconds in ((signal.SIGSTOP, 6), (signal.SIGCONT, 0)):
        for pid in everybody:
            os.kill(pid, number)
        time.sleep(seconds)
    assert program.end() == 0
    assert "error" not in program.err


def test_killed_at_random(config: Path, tmp_path: Path, twin: Path) -> None:
    """FAULTS row 2 and 4: the launcher or a rank, killed at any time; started again until it is done."""
    chance, kills = random.Random(7), 0
    while True:
        program = start(config, tmp_path, [])
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
