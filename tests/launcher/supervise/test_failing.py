"""Errors inside ranks: one line names the rank, the error and the log; NaN ends or is skipped on all ranks alike."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from programs import FOREVER, ONE_RANK, Program

pytestmark = pytest.mark.dist

EXPERTS = '''
import os

from moe_dist.models.experts import Experts


class Second(Experts):
    """Something happens in the second training step of rank 1."""

    calls = 0

    def forward(self, rows, rows_per_expert):
        self.calls += self.training
        out = super().forward(rows, rows_per_expert)
        if self.calls == 2 and self.training and os.environ.get("RANK") == "1":
            return self.happen(out)
        return out


class Bomb(Second):
    def happen(self, out):
        raise ZeroDivisionError("the fuse\\nwas short")


class Greedy(Second):
    def happen(self, out):
        return out.new_empty(2**50)


class Hungry(Second):
    def happen(self, out):
        with open(os.environ["MEMORY_GROUP"], "w") as file:
            file.write(str(os.getpid()))
        return out + len(bytearray(b"x") * 2**29)


class NotANumber(Second):
    def happen(self, out):
        return out * float("nan")
'''


def run(config: Path, folder: Path, expert: str, *options: str, starter: tuple[str, ...] = ()) -> Program:
    """A run of four steps with an expert of one's own, to its end."""
    (folder / "my_experts.py").write_text(EXPERTS)
    command = (*(starter or ("moe-dist",)), "train", config, f"model.expert=my_experts:{expert}")
    ours = (f"train.output_dir={folder / 'run'}", "train.max_steps=4", "checkpoint.save_at_end=false")
    program = Program(*command, *ours, *options, PYTHONPATH=str(folder), GLOO_SOCKET_IFNAME="lo")
    program.end()
    return program


def test_an_exception_in_one_rank(config: Path, tmp_path: Path) -> None:
    program = run(config, tmp_path, "Bomb")
    assert program.process.returncode == 1
    (line,) = program.err.splitlines()
    assert line.startswith("moe-dist: error: rank 1: ZeroDivisionError: the fuse was short; log: ")
    log = Path(line.rpartition("log: ")[2])
    assert log.name == "rank-1.log"
    text = (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    assert "Traceback" in text
    assert "my_experts.py" in text
    program.gone_within(5)


@pytest.mark.launch
def test_an_exception_in_one_rank_of_torchrun(config: Path, tmp_path: Path) -> None:
    starter = ("torchrun", "--standalone", "--nproc-per-node=2", "-m", "launcher")
    program = run(config, tmp_path, "Bomb", starter=starter)
    assert program.process.returncode == 1
    (line,) = [line for line in program.err.splitlines() if line.startswith("moe-dist: ")]
    assert line.startswith("moe-dist: error: rank 1: ZeroDivisionError: the fuse was short; log: ")
    program.gone_within(5)


@pytest.mark.slow
def test_not_enough_memory(config: Path, tmp_path: Path) -> None:
    """The line names the keys to change. Seen to fail without `advice`."""
    (line,) = run(config, tmp_path, "Greedy").err.splitlines()
    assert line.startswith("moe-dist: error: rank 1: RuntimeError: "), line
    assert "; memory: less of it, in this order: train.per_device_train_batch_size, " in line


@pytest.mark.slow
def test_the_kernel_takes_the_memory(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank killed by the OOM killer. Seen to fail without looking at what the kernel has counted."""
    group = Path("/sys/fs/cgroup/memory", f"moe-dist-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"memory cannot be limited here: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(100 * 2**20))
        monkeypatch.setenv("MEMORY_GROUP", str(group / "cgroup.procs"))
        program = run(config, tmp_path, "Hungry")
    finally:
        group.rmdir()
    (line,) = program.err.splitlines()
    place = r"was ended by SIGKILL in step 2, computing, probably by the kernel's OOM killer \(less of it, "
    assert re.search(place, line), line


def test_a_place_that_cannot_be_written_to_is_not_tried_again(config: Path) -> None:
    """Seen to fail as it was: a rank made the folder before anybody looked, and four starts ended with code 1."""
    program = Program("moe-dist", "train", config, "train.output_dir=/sys/kernel/run", "checkpoint.save_steps=2")
    assert program.end() == 2
    (line,) = program.err.splitlines()
    assert line.startswith("moe-dist: error: train.output_dir=/sys/kernel/run: cannot be written to: ")


def test_a_disk_that_is_full_for_a_while(config: Path, small_disk: Path) -> None:
    """Training goes on; log, metrics and TensorBoard do so when there is room, and then steps are saved again.

    Seen to fail as it was: pages of code from the log and from TensorBoard's thread, and no metrics from then on.
    """
    folder, filling = small_disk / "run", small_disk / "filling"
    ours = ("monitor.tensorboard=true", "checkpoint.save_steps=4", "checkpoint.save_total_limit=1")
    command = ("moe-dist", "train", config, *FOREVER, *ONE_RANK, f"train.output_dir={folder}", *ours)
    program = Program(*command)
    program.wait_until(lambda: list(folder.glob("checkpoint-*")), "a step is saved")
    with suppress(OSError):
        filling.write_bytes(bytes(2**22))
    for text in ("metrics.jsonl: No space", "TensorBoard: No space", "no log file: ", "failed: No space left"):
        program.wait_until(lambda text=text: text in program.err, text)
    filling.unlink()
    newest = max(step_of(path) for path in folder.glob("checkpoint-*"))
    program.wait_until(lambda: any(step_of(path) > newest for path in folder.glob("checkpoint-*")), "saved again")
    for name in ("metrics.jsonl", "TensorBoard"):
        program.wait_until(lambda name=name: f"{name} is written again; " in program.err, name)
    os.kill(program.pid, signal.SIGTERM)
    assert program.end() == 75
    assert "Traceback" not in program.out + program.err
    assert "times nothing could be written here" in (folder / "train.log").read_text()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def test_not_finite_stops_all_ranks(config: Path, tmp_path: Path) -> None:
    program = run(config, tmp_path, "NotANumber")
    assert program.process.returncode == 3
    assert summary(tmp_path)["steps"] == 2
    lines = [line for line in program.err.splitlines() if "training stopped itself" in line]
    assert len(lines) == 1
    assert "not finite at step 2" in lines[0]
    assert "Traceback" not in program.err


def test_not_finite_is_skipped_and_counted(config: Path, tmp_path: Path) -> None:
    program = run(config, tmp_path, "NotANumber", "train.on_nonfinite=skip")
    assert program.process.returncode == 0, program.err
    found = summary(tmp_path)
    assert (found["steps"], found["skipped_steps"]) == (4, 1)
    assert "step 2: loss nan" in program.err


def summary(folder: Path) -> dict:
    return json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
