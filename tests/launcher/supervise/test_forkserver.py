"""Ranks that are forked: whose children they are, and what a start costs when the server lives, or does not."""

from __future__ import annotations

import glob
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from patches import Replace
from programs import FOREVER, Program, metrics

from launcher.supervise import forkserver
from launcher.supervise.forkserver import ForkServer, can_fork
from moe_dist.config import Config, load_mapping

pytestmark = [
    *(pytest.mark.dist, pytest.mark.slow),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux"),
]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def server_of(program: Program) -> int | None:
    """The process id of the launcher's fork server."""
    for pid in program.processes():
        with suppress(OSError):
            if b"\0forkserver\0" in Path(f"/proc/{pid}/cmdline").read_bytes() and parent(pid) == program.pid:
                name = Path(f"/proc/{pid}/comm").read_text()
                if not name.startswith("moe-rank-"):
                    return pid
    return None


def trained(program: Program, folder: Path, step: int) -> bool:
    return (folder / "metrics.jsonl").exists() and any(row["step"] >= step for row in metrics(folder, "train"))


def test_ranks_are_the_launchers_children(config: Path, tmp_path: Path) -> None:
    """Also those of the next start, which come from the same server; and of all nothing is left.

    Seen to fail without the fork in between: the parent is the server, whose death would be theirs.
    """
    folder = tmp_path / "run"
    options = (f"train.output_dir={folder}", "checkpoint.save_steps=2", "monitor.progress=none")
    program = Program("moe-dist", "train", config, *FOREVER, *options)
    program.wait_until(lambda: trained(program, folder, 3), "three steps")
    first, server = program.ranks(), server_of(program)
    assert set(first) == {0, 1}
    assert {parent(pid) for pid in first.values()} == {program.pid}
    assert server is not None
    os.kill(first[1], signal.SIGKILL)
    old = set(first.values())
    program.wait_until(lambda: set(program.ranks()) == {0, 1} and old.isdisjoint(program.ranks().values()), "others")
    assert server_of(program) == server
    assert {parent(pid) for pid in program.ranks().values()} == {program.pid}
    os.kill(server, signal.SIGKILL)  # those that train need it no more
    step = metrics(folder, "train")[-1]["step"]
    program.wait_until(lambda: trained(program, folder, step + 3), "three more steps")
    os.kill(program.ranks()[0], signal.SIGKILL)
    program.wait_until(lambda: server_of(program) not in (None, server), "another server")
    program.wait_until(lambda: len(program.ranks()) == 2, "two ranks once more")
    os.kill(program.pid, signal.SIGKILL)
    program.gone_within(5.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_before_there_are_ranks(config: Path, tmp_path: Path, number: int) -> None:
    program = Program("moe-dist", "train", config, *FOREVER, f"train.output_dir={tmp_path / 'run'}")
    program.wait_until(lambda: server_of(program), "a server")
    assert not program.ranks()
    os.kill(program.pid, number)
    assert program.end(20.0) == 128 + number
    assert "every process has ended" in program.err
    program.gone_within(2.0)


def test_a_server_that_dies_before_it_has_forked(config: Path, tmp_path: Path) -> None:
    """Its end is that of the ranks it was asked for: a run that saves starts again, with another one."""
    folder = tmp_path / "run"
    program = Program("moe-dist", "train", config, f"train.output_dir={folder}", "checkpoint.save_steps=2")
    server = program.wait_until(lambda: server_of(program), "a server")
    os.kill(server, signal.SIGKILL)
    assert program.end() == 0, program.err
    assert re.search(rf"rank 0 \(pid {server}\) was ended by SIGKILL", program.err)
    assert trained(program, folder, 3)


def test_files_have_the_numbers_they_had(tmp_path: Path) -> None:
    """Whatever numbers they have on the way; and a rank's environment is its own."""
    script = tmp_path / "moe_rank_probe.py"
    script.write_text(
        "import os, sys\n"
        "def run_rank():\n"
        "    os.write(int(os.environ['OUT']), f\"{os.environ['RANK']} {os.environ.get('GONE')}\".encode())\n"
        "    os._exit(7 + int(os.environ['RANK']))\n"
        "from launcher.rank import forkserver\n"
        "forkserver.run_rank, forkserver.IMPORTED = run_rank, ()\n"
        "import time; time.sleep(1)  # as imports do: requests pile up\n"
        "forkserver.serve()\n"
    )
    real = subprocess.Popen
    reads, writes = zip(*(os.pipe() for _ in range(2)), strict=True)
    try:
        subprocess.Popen = lambda command, **options: real([sys.executable, str(script)], **options)  # type: ignore[misc,assignment]
        here = {**os.environ, "MOE_DIST_LAUNCHER": str(os.getpid()), "GONE": "still here", "PYTHONPATH": os.getcwd()}
        server = ForkServer(here)
    finally:
        subprocess.Popen = real  # type: ignore[misc]
    try:
        own = {name: value for name, value in here.items() if name != "GONE"}
        ranks = [server.fork(own | {"RANK": str(n), "OUT": str(writes[n])}, [writes[1 - n], writes[n]]) for n in (0, 1)]
        late = [server.fork(own | {"RANK": str(n), "OUT": "2", "PAD": "x" * 20_000}, [2]) for n in range(40)]
        assert [rank.wait(30.0) for rank in ranks] == [7, 8]
        assert [os.read(file, 100) for file in reads] == [b"0 None", b"1 None"]
        assert [rank.wait(30.0) for rank in late] == [
            7 + n for n in range(40)
        ]  # seen to hang: those after the first 200 kB
    finally:
        server.close()
        for file in (*reads, *writes):
            os.close(file)
    assert not server.runs


def test_where_ranks_are_not_forked(replace: Replace) -> None:
    asked: list[str] = []
    replace(glob, "glob", lambda pattern: asked.append(pattern) or ["/dev/nvidia0"])
    assert can_fork(load_mapping({"launch": {"device": "cpu"}}))
    assert not asked
    assert not can_fork(Config())
    assert asked == ["/dev/nvidia[0-9]*"]
    assert forkserver.glob is glob


def test_ranks_that_are_programs_of_their_own(config: Path, tmp_path: Path) -> None:
    """As on a machine with GPUs: each imports for itself, and the run is the same."""
    folder = tmp_path / "run"
    code = (
        "import sys, launcher.supervise.processes as processes; processes.can_fork = lambda config: False; "
        "from launcher.cli.main import main; main()"
    )
    program = Program(sys.executable, "-c", code, "train", config, f"train.output_dir={folder}")
    program.wait_until(lambda: len(program.ranks()) == 2, "two ranks")
    assert all(b"rank" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in program.ranks().values())
    assert server_of(program) is None
    assert program.end() == 0, program.err
    assert trained(program, folder, 3)
