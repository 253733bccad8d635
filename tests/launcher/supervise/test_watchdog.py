"""Under torchrun nobody watches from outside: the ranks find out themselves whom they wait for, say so and end."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from mortal import PLANTED, errors
from programs import Program, losses, metrics

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def start(
    config: Path, folder: Path, *options: str, ranks: int = 2, planted: str = "", starter: Sequence[str] = ()
) -> Program:
    folder.mkdir(exist_ok=True)
    (folder / "planted.py").write_text(PLANTED)
    torchrun = ("torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m", "moe_dist", "train")
    own = ("model.expert=planted:Planted", "parallel.ep_size=2", f"train.output_dir={folder / 'run'}")
    surroundings = {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(folder), "PLANTED": planted}
    return Program(*(starter or torchrun), config, *own, *options, **surroundings)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_rank_is_found_named_and_ended(config: Path, tmp_path: Path, victim: int) -> None:
    """FAULTS row 10, also when it is rank 0 that nobody can ask any more. Seen to fail with verdicts not acted on."""
    program = start(config, tmp_path, "train.max_steps=4000", "monitor.stall_timeout=4")
    program.wait_for("step: 25/")  # some seconds: signs of life are half a second apart
    pid = program.ranks()[victim]
    os.kill(pid, signal.SIGSTOP)
    sent = time.monotonic()
    program.wait_until(lambda: errors(program), "an error")
    assert time.monotonic() - sent < 10
    assert program.end() == 1
    assert not program.ranks()
    (line,) = errors(program)
    assert re.match(
        rf"moe-dist: error: rank {victim} \(pid {pid} on \S+\) has not moved for [4-9] s, in step \d+, .*, last "
        r"collectives world \d+: it is stopped \(SIGSTOP\); ",
        line,
    ), line
    for log in ("train.log", "logs/rank-1.log"):
        assert "most recent call first" in (tmp_path / "run" / log).read_text(), log


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        (
            "loop",
            r"rank 1 \(pid \d+ on \S+\) has not moved for \d+ s, in step 4, computing, last collectives world",
        ),
        (
            "other",  # it has called one thing less than the rank that waits for it
            r"rank 1 \(pid \d+ on \S+\) has not moved for \d+ s, in step 4, computing, in all_reduce, last collectives",
        ),
        (
            "shape",  # gloo ends a process that gets more than it has asked for, and says so on its own
            r"rank 0 \(pid \d+ on \S+\) has gone, last seen .*: it ended without a word \(killed, crashed, ",
        ),
    ],
    ids=["loop", "other", "shape"],
)
def test_a_loop_and_a_wrong_collective_are_found_and_named(
    config: Path, tmp_path: Path, planted: str, expected: str
) -> None:
    """FAULTS rows 10 and 12: the others wait in a collective; every rank writes its stack and ends.
    Seen to fail with verdicts not acted on."""
    options = ("parallel.ep_size=2", "train.max_steps=9", "monitor.stall_timeout=4")
    program = start(config, tmp_path, *options, planted=planted, ranks=2)
    assert program.end() == 1
    (line,) = errors(program)
    assert re.match(f"moe-dist: error: {expected}", line), line
    assert not program.ranks()
    place = "Connection " if planted == "shape" else r'planted.py", line \d+,? in forward'  # it may have got further
    assert re.search(place, (tmp_path / "run" / "logs" / "rank-1.log").read_text())


def test_stopped_and_continued(config: Path, tmp_path: Path) -> None:
    """FAULTS row 11: a rank that is stopped for less than the limit, or all of them for more, as Slurm suspends a job:
    nothing happens, the run is its twin. Seen to fail without `_went_on`."""
    program = start(config, tmp_path, "train.max_steps=40", "monitor.stall_timeout=8")
    program.wait_for("step: 5/")
    pids = program.ranks()
    for victims, seconds in (([pids[1]], 3), ([pids[0]], 3), (list(pids.values()), 12)):
        for pid in victims:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        for pid in victims:
            os.kill(pid, signal.SIGCONT)
        time.sleep(1)
    assert program.end() == 0, program.err
    assert not errors(program)
    twin = start(config, tmp_path / "twin", "train.max_steps=40")
    assert twin.end() == 0, twin.err
    assert losses(tmp_path / "run") == losses(tmp_path / "twin" / "run")


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_is_named_once(config: Path, tmp_path: Path, victim: int) -> None:
    """By the lowest one that is left; not by everybody, and not as `Connection closed by peer`. Seen to fail
    without `last_words`: torchrun's SIGTERM came before the line."""
    program = start(config, tmp_path, "train.max_steps=4000", ranks=4)
    program.wait_for("step: 25/")  # some seconds: signs of life are half a second apart
    pid = program.ranks()[victim]
    os.kill(pid, signal.SIGKILL)
    assert program.end() == 1
    (line,) = errors(program)
    assert line.startswith(f"moe-dist: error: rank {victim} (pid {pid} on "), line
    assert re.search(r"has gone, last seen in step \d+, .*: it ended without a word", line), line


@pytest.mark.launch
def test_an_agent_of_ours_says_it_in_one_line_and_starts_again(config: Path, tmp_path: Path) -> None:
    """The rank that stands still is ended with SIGKILL, which is not what went wrong.

    Seen to fail with that signal named as the cause: `was ended by SIGKILL, by a person or by the kernel's OOM killer`.
    """
    options = ("train.max_steps=60", "checkpoint.save_steps=4", "monitor.stall_timeout=4")
    program = start(config, tmp_path, *options, starter=("moe-dist", "launch", "torchrun"))
    program.wait_for("step: 9/")
    os.kill(program.ranks()[1], signal.SIGSTOP)
    assert program.end() == 0, program.err
    (line,) = errors(program)
    assert line.startswith("moe-dist: error: rank 1 (pid "), line
    assert "it is stopped (SIGSTOP)" in line
    assert re.search(r"; starting again from checkpoint-(8|1\d|2\d) \(try 1 of 3\)$", line), line
    (noted,) = metrics(tmp_path / "run", "failure")  # where doctor and the report find it
    assert line.startswith(f"moe-dist: error: {noted['reason']}; starting again")
