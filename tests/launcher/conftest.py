"""Finished runs that many tests look at, and an end for everything a test has started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mortal import start
from programs import ONE_RANK, Program, Run, stop_all, write_config
from ranks import free_port


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    yield
    stop_all()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("launcher"))


def _run(folder: Path, program: Program) -> Run:
    return Run(folder, program.end(), program)


@pytest.fixture(scope="session")
def one_rank(config: Path) -> Run:
    """One process doing the micro-batches of two, on a plain console."""
    folder = config.parent / "one"
    accumulate = "train.gradient_accumulation_steps=2"
    return _run(folder, Program("moe-dist", "train", config, *ONE_RANK, accumulate, f"train.output_dir={folder}"))


@pytest.fixture(scope="session")
def two_ranks(config: Path) -> Run:
    """`moe-dist train` with two ranks, on a terminal."""
    folder = config.parent / "two"
    options = (f"train.output_dir={folder}", "monitor.progress=auto")
    return _run(folder, Program("moe-dist", "train", config, *options, tty=True))


@pytest.fixture(scope="session")
def twin(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of tests/launcher/mortal.py, left alone."""
    folder = tmp_path_factory.mktemp("twin")
    program = start(config, folder, [])
    assert program.end() == 0, program.err
    return folder / "run"


@pytest.fixture(scope="session")
def torchrun_module(config: Path) -> Run:
    """`torchrun -m moe_dist train` with two ranks."""
    folder = config.parent / "torchrun"
    command = ("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "moe_dist", "train", config)
    return _run(folder, Program(*command, f"train.output_dir={folder}", GLOO_SOCKET_IFNAME="lo"))


@pytest.fixture(scope="session")
def two_agents(config: Path) -> list[Run]:
    """Two agents of torchrun, as on two machines, each starting one rank with `--no-python moe-dist train`."""
    folder, port = config.parent / "agents", free_port()
    programs = []
    for node in range(2):
        command = ["torchrun", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1"]
        command += ["--master-addr=127.0.0.1", f"--master-port={port}", "--no-python", "moe-dist", "train"]
        programs.append(Program(*command, config, f"train.output_dir={folder}", GLOO_SOCKET_IFNAME="lo", PATH=_path()))
    return [_run(folder, program) for program in programs]


def _path() -> str:
    import os

    from programs import BIN

    return f"{BIN}{os.pathsep}{os.environ['PATH']}"
