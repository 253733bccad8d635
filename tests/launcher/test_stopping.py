"""Ctrl-C, SIGTERM and sudden deaths: everything ends, soon, with one line that says why."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from programs import FOREVER, ONE_RANK, Program

pytestmark = pytest.mark.dist

LIMIT = 5.0


def start(config: Path, folder: Path, *options: str, tty: bool = False) -> Program:
    """Training that goes on until somebody stops it, in its third step or so."""
    command = ("moe-dist", "train", config, *FOREVER, f"train.output_dir={folder / 'run'}", *options)
    program = Program(*command, tty=tty)
    program.wait_for("step" if tty else "step: 2/")
    return program


def ends(program: Program, sent: float) -> int:
    """The exit code; within the limit nothing of the session is left."""
    code = program.end(LIMIT)
    program.gone_within(LIMIT)
    assert time.monotonic() - sent < LIMIT
    assert "Traceback" not in program.out + program.err
    return code


def test_ctrl_c_to_the_launcher_alone_while_a_rank_does_not_move(config: Path, tmp_path: Path) -> None:
    program = start(config, tmp_path)
    os.kill(program.ranks()[1], signal.SIGSTOP)  # the other one waits for it in a collective
    sent = time.monotonic()
    os.kill(program.pid, signal.SIGINT)
    assert ends(program, sent) == 130
    assert program.err.splitlines() == ["moe-dist: stopped by Ctrl-C; every process has ended"]


def test_terminate_a_single_process(config: Path, tmp_path: Path) -> None:
    program = start(config, tmp_path, *ONE_RANK)
    sent = time.monotonic()
    os.kill(program.pid, signal.SIGTERM)
    assert ends(program, sent) == 143
    assert program.err.splitlines() == ["moe-dist: stopped by SIGTERM; every process has ended"]


def test_ctrl_c_typed_on_a_terminal(config: Path, tmp_path: Path) -> None:
    program = start(config, tmp_path, "monitor.progress=auto", tty=True)
    program.wait_for("grad")
    sent = time.monotonic()
    program.type("\x03")
    assert ends(program, sent) == 130
    assert program.out.count("moe-dist: ") == 1
    assert "moe-dist: stopped by Ctrl-C" in program.out
    assert program.out.rindex("\x1b[?25h") > program.out.rindex("\x1b[?25l"), "the cursor is still hidden"
    before, _, _ = program.out.rpartition("moe-dist: stopped")
    assert before.endswith("\n"), "the last word stands on the progress line"


@pytest.mark.parametrize("moment", ["the command imports", "ranks start", "ranks import torch"])
def test_ctrl_c_before_training(config: Path, tmp_path: Path, moment: str) -> None:
    ranks = ONE_RANK if moment == "ranks start" else ()
    program = Program("moe-dist", "train", config, *FOREVER, *ranks, f"train.output_dir={tmp_path / 'run'}")
    reached = {
        "the command imports": lambda: loaded(program.pid, "_pydantic_core"),
        "ranks start": program.ranks,
        "ranks import torch": lambda: any(loaded(pid, "libtorch_cpu") for pid in program.ranks().values()),
    }
    program.wait_until(reached[moment], moment)
    sent = time.monotonic()
    os.killpg(program.pid, signal.SIGINT)
    assert ends(program, sent) == 130
    (line,) = program.err.splitlines()
    assert line.startswith("moe-dist: stopped by Ctrl-C")


def loaded(pid: int, library: str) -> bool:
    """Whether a process has a shared library in memory: a way to see how far its imports are."""
    with suppress(OSError):
        return library in Path(f"/proc/{pid}/maps").read_text()
    return False


def test_a_killed_rank_ends_the_run_and_is_named(config: Path, tmp_path: Path) -> None:
    program = start(config, tmp_path)
    victim = program.ranks()[1]
    sent = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert ends(program, sent) == 1
    (line,) = program.err.splitlines()
    assert line.startswith(f"moe-dist: error: rank 1 (pid {victim}) was ended by SIGKILL")
    assert "logs/rank-1.log" in line
    # The other one has noticed by itself, and says so where it belongs.
    assert "by peer" in (tmp_path / "run" / "train.log").read_text()


def test_nothing_outlives_a_killed_launcher(config: Path, tmp_path: Path) -> None:
    program = start(config, tmp_path)
    assert len(program.ranks()) == 2
    os.kill(program.pid, signal.SIGKILL)
    assert program.gone_within(10) < 10
    assert "Traceback" not in program.err
