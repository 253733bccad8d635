"""Values that other programs accept, and what is missing: no foreign message, no rank that cannot start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from patches import Replace

from launcher.connect import host_names
from launcher.connect.environment import Environment, detect, from_slurm, given_batch, refuse_half_a_torchrun, this_job
from moe_dist.config import Config, ConfigError

ROOT = Path(__file__).parents[3]
RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TASK = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "a",
}


@pytest.mark.parametrize(
    ("said", "threads"), [("3", 3), (" 4,2", 4), ("", 2), ("auto", 2), ("0", 2), ("-1", 2), ("9" * 15, 2), ("1e1", 2)]
)
def test_thread_counts_as_openmp_takes_them(
    monkeypatch: pytest.MonkeyPatch, replace: Replace, said: str, threads: int
) -> None:
    """Seen red: a ValueError of int() for all but the first, or a thread count that torch cannot have."""
    from launcher.connect import process_groups

    monkeypatch.setenv("OMP_NUM_THREADS", said)
    if threads == 2:
        replace(process_groups, "usable_cores", lambda: 4)
    assert process_groups.choose_threads(Config(), Environment(local_world_size=2)) == threads


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is empty, but WORLD_SIZE=2"),
        ({"MASTER_PORT": " "}, "MASTER_PORT is empty, but WORLD_SIZE=2"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: from 1 to 65535"),
        ({"RANK": ""}, "RANK is empty"),
    ],
)
def test_empty_variables_are_named(change: dict[str, str], said: str) -> None:
    """Seen red: empty addresses and ports beyond the last went on to torch's own errors."""
    with pytest.raises(ConfigError, match=said):
        detect(RANK | change)


def test_empty_variables_are_as_if_not_there() -> None:
    """Seen red: SLURM_RESTART_COUNT='' was an error that called it not set, and made a first start a second one."""
    expected = from_slurm(TASK)
    assert from_slurm(TASK | {"SLURM_RESTART_COUNT": "", "MASTER_ADDR": "", "MASTER_PORT": ""}) == expected
    assert this_job({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": ""}) == this_job({"SLURM_JOB_ID": "7"})
    assert detect(RANK | {"LOCAL_WORLD_SIZE": "", "LOCAL_RANK": ""}) == detect(RANK)
    assert given_batch({"MOE_DIST_GLOBAL_BATCH": ""}) is None
    refuse_half_a_torchrun({"PET_NNODES": ""})


def test_a_name_that_comes_later_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    known = threading.Event()

    def lookup(host: str, port: object) -> list[object]:
        if not known.is_set():
            raise socket.gaierror(-2, "Name or service not known")
        return []

    replace(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(host_names, "EVERY", 0.0)
    monkeypatch.setattr(host_names, "_POLL", 0.01)
    threading.Timer(0.1, known.set).start()
    began = time.monotonic()
    host_names.wait_for_name("later", 60.0)
    assert time.monotonic() - began < 50
    assert "waiting for a host named MASTER_ADDR=later (Name or service not known)" in capsys.readouterr().err


def test_a_name_that_never_comes_is_one_line_with_the_variable() -> None:
    """Seen red: 44 lines of torch's after 33 s, none with the variable's name."""
    env = {**os.environ, **RANK, "RANK": "1", "LOCAL_RANK": "1", "PYTHONPATH": str(ROOT)}
    env["MASTER_ADDR"] = "no-such-host.invalid"
    words = [sys.executable, "-m", "moe_dist", "train", str(ROOT / "configs" / "demo.yaml"), "launch.timeout=1"]
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = "0", "1"
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "MASTER_ADDR=no-such-host.invalid: no host of that name after 1 s" in line


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    """Seen red: `'NoneType' object has no attribute 'flush'`, and ranks that wrote their words into a socket."""
    (tmp_path / "program.py").write_text(_STREAMS)
    command = f"exec {sys.executable} {tmp_path / 'program.py'} {closed}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SEEN": str(tmp_path / "seen")}
    done = subprocess.run(["sh", "-c", command], env=env, timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "seen").read_text() == "3 True"


_STREAMS = """
import os, sys
from launcher.cli.main import _have_streams
_have_streams()
print("out"); print("err", file=sys.stderr); sys.stdout.flush(); sys.stderr.isatty(); sys.stdin.read(0)
found = os.open(os.environ["SEEN"], os.O_CREAT | os.O_WRONLY)
os.write(found, f"{sum(os.fstat(n) is not None for n in range(3))} {found > 2}".encode())
"""


def test_a_trial_of_a_sweep_finds_its_numbers_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: Replace
) -> None:
    """Ray's worker has a folder of its own. Seen red: `-` for every number of a sweep with a relative output_dir."""
    import json

    from launcher.sweep import trial

    (tmp_path / "home" / "out").mkdir(parents=True)
    (tmp_path / "home" / "out" / "metrics.jsonl").write_text('{"kind": "train", "step": 3, "loss": 1.5}\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    popen = subprocess.Popen
    replace(trial.subprocess, "Popen", lambda words, **kind: popen([sys.executable, "-c", ""], **kind))
    config = Config.model_validate({"train": {"output_dir": "out"}})
    result = tmp_path / "result.json"
    trial.run(config, "digest", tmp_path / "log", result, lambda row: None, str(tmp_path / "home"))
    assert json.loads(result.read_text())["metrics"]["train"]["loss"] == 1.5
