"""Ranks started by a real mpirun (MPICH's, from its wheel)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from programs import BIN, FOREVER, Program, Run, losses

from launcher.connect.mpi import started_by_mpi
from moe_dist.config import ConfigError

MPIRUN = BIN / "mpiexec"
real = [
    pytest.mark.dist,
    pytest.mark.launch,
    pytest.mark.slow,
    pytest.mark.skipif(
        not MPIRUN.exists(), reason="NOT TESTED HERE: there is no mpiexec beside this Python (pip install mpich mpi4py)"
    ),
]

SLOW_TO_SPEAK = """\
import time
from moe_dist.train.callbacks import Callback

class Slow(Callback):
    def on_run_end(self, run, result):
        time.sleep(2 * (run.rank == 0))
"""


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"PMI_SIZE": "1"}, False),
        # What a task of `srun --mpi=pmix` is told (Slurm 22.05, PMIx 4.2); Slurm's variables make it a rank.
        ({"PMIX_RANK": "1", "PMIX_NAMESPACE": "slurm.pmix.1.0", "SLURM_MPI_TYPE": "pmix"}, False),
        ({"PMI_SIZE": "1", "MOE_DIST_MPI": "1"}, True),
        ({"PMI_SIZE": "2", "MOE_DIST_MPI": "0"}, False),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "RANK": "0", "WORLD_SIZE": "1", "MOE_DIST_MPI": "0"}, False),
        ({"PMI_SIZE": "2", "RANK": "9", "WORLD_SIZE": "16", "TORCHELASTIC_RUN_ID": "x"}, False),  # of agents
    ],
)
def test_who_is_a_process_of_mpirun(environ: dict[str, str], expected: bool) -> None:
    assert started_by_mpi(environ) == expected


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"PMI_SIZE": "two"}, "PMI_SIZE=two: a whole number"),
        ({"MOE_DIST_MPI": "yes"}, "MOE_DIST_MPI=yes: 1"),
        ({"MOE_DIST_MPI": "1"}, "no mpirun has started"),
        (
            {"PMI_SIZE": "2", "PMI_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"},
            "WORLD_SIZE=1, but in .* it is 2: unset",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "RANK": "0"},
            "RANK=0, but in .* it is 1: unset",
        ),
    ],
)
def test_contradictions(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        started_by_mpi(environ)


def ranks_of(program: Program) -> dict[int, int]:
    """Rank -> pid."""
    found = {}
    for pid in program.processes():
        with suppress(OSError):
            for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if item.startswith(b"PMI_RANK="):
                    found[int(item[9:])] = pid
    return found


class TestReal:
    pytestmark = real

    def start(self, config: Path, folder: Path, *options: str, **environment: str) -> Program:
        command = (MPIRUN, "-n", "2", BIN / "moe-dist", "train", config, f"train.output_dir={folder}")
        return Program(*command, *options, **environment)

    def test_trains_as_our_own_launcher_does(self, config: Path, tmp_path: Path, two_ranks: Run) -> None:
        program = self.start(config, tmp_path / "run")
        assert program.end() == 0, program.err
        assert losses(tmp_path / "run") == losses(two_ranks.folder)
        assert program.out.count("step: 1/3") == 1, "one rank speaks for all"

    def test_launch_mpi_is_that_command(self, config: Path, tmp_path: Path, two_ranks: Run) -> None:
        program = Program("moe-dist", "launch", "mpi", config, f"train.output_dir={tmp_path / 'run'}")
        assert program.end() == 0, program.err
        assert losses(tmp_path / "run") == losses(two_ranks.folder)

    def test_profile_has_ranks_too(self, config: Path, tmp_path: Path) -> None:
        """Seen to fail with `profile` not joining: two processes start two ranks each, and write two pages."""
        program = Program(
            MPIRUN, "-n", "2", BIN / "moe-dist", "profile", config, f"train.output_dir={tmp_path / 'run'}"
        )
        assert program.end() == 0, program.err
        assert program.out.count("profile.html") == 1

    def test_told_to_stop_it_saves(self, config: Path, tmp_path: Path) -> None:
        """The rank that speaks is the last to be done: mpirun ends all as soon as one leaves with code 75."""
        (tmp_path / "slow.py").write_text(SLOW_TO_SPEAK)
        options = (*FOREVER, "train.callbacks=[slow:Slow]")
        program = self.start(config, tmp_path / "run", *options, PYTHONPATH=str(tmp_path))
        program.wait_for("step: 2/")
        os.kill(ranks_of(program)[0], signal.SIGUSR1)
        program.end()
        (folder,) = (tmp_path / "run").glob("checkpoint-*")
        assert (folder / "manifest.json").is_file()
        assert f"{folder} is saved; the same command goes on from it" in program.err

    def test_a_killed_rank_ends_the_job(self, config: Path, tmp_path: Path) -> None:
        program = self.start(config, tmp_path / "run", *FOREVER)
        program.wait_for("step: 2/")
        os.kill(ranks_of(program)[1], signal.SIGKILL)
        assert program.end(20) != 0
        program.gone_within(10)

    def test_bad_configuration_is_one_line(self, config: Path) -> None:
        program = self.start(config, Path("unused"), "num_expert=5")
        assert program.end() == 2
        said = [line for line in program.err.splitlines() if "num_expert" in line]
        assert said[0] == "moe-dist: error: num_expert=5: unknown key; nearest: model.num_experts (command line)"

    def test_without_mpi4py_it_says_what_is_missing(self, config: Path, tmp_path: Path) -> None:
        (tmp_path / "mpi4py.py").write_text("raise ImportError('no libmpi.so.12')\n")
        command = [sys.executable, "-m", "moe_dist", "train", str(config)]
        environ = {**os.environ, "PYTHONPATH": str(tmp_path), "PMI_SIZE": "2", "PMI_RANK": "0"}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "mpi4py cannot be used" in done.stderr
        assert "no libmpi.so.12" in done.stderr


def test_the_wheel_is_there_in_the_development_environment() -> None:
    """On Linux `pip install -e '.[dev]'` brings an MPI, so that the tests above are not skipped in silence."""
    if sys.platform.startswith("linux") and shutil.which("ruff", path=str(BIN)):
        assert MPIRUN.exists()
