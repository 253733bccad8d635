"""`moe-dist launch local|torchrun|mpi --dry-run`: what would be run, and what is refused in words."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from programs import Program, Run, losses, write_config

from launcher.backends.torchrun import address_towards, interface_of

DEMO = Path(__file__).parents[3] / "configs/demo.yaml"
QUIET = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")}
# Its own folder: that of the run file may hold a run of whoever works here, whose batch it would keep.
ELASTIC = ("parallel.elastic=true", "checkpoint.resume=auto", "train.output_dir=outputs/nobody-has-run")
BOTH = ("--nnodes=2", "--rdzv-endpoint=127.0.0.1:29400")


def launch(*words: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", "launch", *map(str, words), "--dry-run"]
    return subprocess.run(command, env={**QUIET, **environ}, capture_output=True, text=True, timeout=100, check=False)


def planned(*words: str | Path, **environ: str) -> tuple[dict[str, str], list[str]]:
    """Variables and words of the command line that is printed."""
    done = launch(*words, **environ)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = shlex.split(line)
    count = next(place for place, word in enumerate(found) if "=" not in word)
    return dict(word.split("=", 1) for word in found[:count]), found[count:]


def test_torchrun_on_one_machine() -> None:
    variables, words = planned("torchrun", DEMO, "train.max_steps=5")
    assert variables["GLOO_SOCKET_IFNAME"] == "lo"
    assert int(variables["OMP_NUM_THREADS"]) >= 1
    assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert words[:7] == [
        *(sys.executable, "-m", "moe_dist", "agent", "--nnodes=1", "--nproc-per-node=2"),
        "--max-restarts=0",  # the demo saves at its end only
    ]
    assert words[-5:] == ["-m", "moe_dist", "train", str(DEMO), "train.max_steps=5"]


def test_torchrun_on_several_machines() -> None:
    """The same line on each; torchrun understands it. What a person has set stays."""
    options = (
        *BOTH,
        "--nproc-per-node=4",
        "--node-rank=1",
        "--rdzv-conf=read_timeout=9,heartbeat=2",
        "--option=--tee=3",
    )
    variables, words = planned("torchrun", DEMO, *options, "checkpoint.save_steps=5", GLOO_SOCKET_IFNAME="ib0")
    assert "GLOO_SOCKET_IFNAME" not in variables
    from torch.distributed.run import parse_args

    read = parse_args(words[4:])
    assert (read.nnodes, read.nproc_per_node, read.max_restarts) == ("2", "4", 3)
    assert (read.rdzv_backend, read.rdzv_endpoint, read.local_addr) == ("c10d", "127.0.0.1:29400", "127.0.0.1")
    conf = dict(pair.split("=") for pair in read.rdzv_conf.split(","))
    assert conf == {
        "keep_alive_interval": "1",
        "keep_alive_max_attempt": "3",
        "last_call_timeout": "3",
        "heartbeat": "2",
        "read_timeout": "9",
        "is_host": "0",
    }
    assert (read.shutdown_timeout, read.tee) == (30, "3")
    assert read.training_script_args == ["train", str(DEMO), "checkpoint.save_steps=5"]
    _, other = planned("torchrun", DEMO, *options, "checkpoint.save_steps=5", "train.output_dir=other")
    assert [word for word in other if "rdzv-id" in word] != [word for word in words if "rdzv-id" in word]


def test_torchrun_is_told_by_kubernetes() -> None:
    """An operator's PET_..., and the number that an Indexed Job gives to each of its pods."""
    environ = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "127.0.0.1:29400", "JOB_COMPLETION_INDEX": "1"}
    _, words = planned("torchrun", DEMO, **environ)
    assert "--nnodes=2" in words
    assert any("is_host=0" in word for word in words)


def test_an_elastic_run_has_one_batch_whoever_comes_first() -> None:
    """That of all three machines: 3 x 2 ranks x 8 sequences."""
    variables, words = planned("torchrun", DEMO, *BOTH[1:], "--nnodes=1:3", *ELASTIC)
    assert variables["MOE_DIST_GLOBAL_BATCH"] == "48"
    assert "--nnodes=1:3" in words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nnodes=two",), "--nnodes two: allowed: a number of machines, or the fewest and the most, as in 1:4"),
        (("--nnodes=3:2",), "--nnodes 3:2: allowed"),
        (("--nnodes=2",), "--nnodes 2: say where the machines meet: --rdzv-endpoint HOST:PORT"),
        ((*BOTH, "--node-rank=2"), "--node-rank 2: from 0 to 1 (--nnodes 2)"),
        ((*BOTH, "--nproc-per-node=3", "parallel.ep_size=4"), "2 nodes x 3 ranks: world_size=6"),
        ((*BOTH[1:], "--nnodes=1:2"), "--nnodes 1:2: the number of ranks may change; allowed with parallel.elastic"),
        ((*BOTH[1:], "--nnodes=1:7", *ELASTIC, "--nproc-per-node=2"), "3 nodes x 2 ranks: world_size=6: no layout"),
        (
            (*BOTH[1:], "--nnodes=1:2", "parallel.elastic=true", "checkpoint.resume=never"),
            "checkpoint.resume=never: with --nnodes 1:2 every change of machines is a new start",
        ),
        (("--nnodes=2", "--rdzv-endpoint=host:"), "--rdzv-endpoint host:: HOST:PORT, the same on every machine"),
        ((*BOTH, "--rdzv-conf=fast"), "--rdzv-conf fast: NAME=VALUE,NAME=VALUE"),
    ],
    ids=str,
)
def test_what_torchrun_cannot_do_is_one_line(words: tuple[str, ...], said: str) -> None:
    done = launch("torchrun", DEMO, *words)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("moe-dist: error: ")
    assert said in line


def test_interfaces_and_addresses() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert address_towards("localhost:1") == "127.0.0.1"
    mine = address_towards("192.0.2.7:1")
    assert interface_of(mine) or not mine[0].isdigit()


def test_local_is_train() -> None:
    variables, words = planned("local", DEMO, "train.max_steps=5")
    assert words == [sys.executable, "-m", "moe_dist", "train", str(DEMO), "train.max_steps=5"]
    assert variables["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.dist
@pytest.mark.launch
@pytest.mark.slow
def test_what_is_printed_can_be_run(tmp_path: Path, two_ranks: Run) -> None:
    """Copied into a shell, the line of each starter trains as `moe-dist train` does."""
    config = write_config(tmp_path)
    for starter in ("local", "torchrun"):
        folder = tmp_path / starter
        done = launch(starter, config, f"train.output_dir={folder}")
        program = Program("sh", "-c", done.stdout)
        assert program.end() == 0, program.err
        assert losses(folder) == losses(two_ranks.folder)


SAYS = {"Open MPI": "mpirun (Open MPI) 5.0.11", "MPICH": "HYDRA build details:\\n    Version: 5.0.2", "other": "hello"}


def mpirun_that_says(folder: Path, name: str) -> Path:
    """A program in mpirun's place that only tells whose it is: no machine has both."""
    program = folder / "mpirun"
    program.write_text(f"#!/bin/sh\nprintf '{SAYS[name]}\\n'\n")
    program.chmod(0o755)
    return program


def test_open_mpi_and_mpich_are_told_in_their_own_ways(tmp_path: Path) -> None:
    train = [sys.executable, "-m", "moe_dist", "train", str(DEMO)]
    program = mpirun_that_says(tmp_path, "Open MPI")
    hosts = ("--hosts=a:2,b:2", f"--mpirun={program}", "--option=--oversubscribe")
    variables, words = planned("mpi", DEMO, *hosts, OMP_NUM_THREADS="3")
    assert variables == {}
    assert words[:7] == [str(program), "-n", "4", "--host", "a:2,b:2", "--bind-to", "none"]
    assert words[words.index("OMP_NUM_THREADS") - 1 :][:2] == ["-x", "OMP_NUM_THREADS"]
    assert words[-6:] == ["--oversubscribe", *train]

    mpirun_that_says(tmp_path, "MPICH")
    _, words = planned("mpi", DEMO, *hosts)
    assert words == [str(program), "-n", "4", "-hosts", "a:2,b:2", "--oversubscribe", *train]

    variables, words = planned("mpi", DEMO, "-n", "1", "ep_size=1", f"--mpirun={program}")
    assert words[:3] == [str(program), "-n", "1"]
    assert variables["MOE_DIST_MPI"] == "1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--mpirun=nowhere",), "--mpirun nowhere: there is no such program"),
        (("--hosts=a:0",), "--hosts a:0: names with the number of ranks on each"),
        (("--hosts=a:2", "--hostfile=h"), "one of them"),
        (("-n", "3"), "world_size=3: not a multiple"),
    ],
    ids=str,
)
def test_what_mpirun_cannot_do_is_one_line(words: tuple[str, ...], said: str) -> None:
    done = launch("mpi", DEMO, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_program_that_is_no_mpirun(tmp_path: Path) -> None:
    program = mpirun_that_says(tmp_path, "other")
    done = launch("mpi", DEMO, f"--mpirun={program}")
    assert done.returncode == 2
    assert "neither Open MPI's mpirun nor MPICH's; it says: hello" in done.stderr
