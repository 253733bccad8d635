"""A real Ray cluster on this machine: nodes told apart by number, each with its own raylet, killed without a word.

Folder and ports are its own, so it disturbs no other Ray; everything it has started carries its folder in the command
line or the environment, and is gone when the `with` block is left. `ray stop` would end every Ray of this machine.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from programs import BIN
from ranks import free_port

PATIENCE = 240.0
"""Seconds after which something has failed; a busy machine needs a fraction of it."""
ROOT = Path(__file__).parents[2]


def missing() -> str | None:
    """Why nothing of Ray can be tested here; None when it can."""
    if importlib.util.find_spec("ray") is None:
        return "NOT TESTED, THERE IS NO RAY HERE: pip install 'moe-dist[ray]'"
    return None


class Cluster:
    """Nodes of `cpus` CPUs each; node 1 is the head."""

    def __init__(self, cpus: int = 1) -> None:
        self.cpus = cpus
        # A socket's path must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self.port = free_port()
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        # For everybody who is to find the cluster.
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._count = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Cluster:
        try:
            self.add_node()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def add_node(self) -> int:
        """Start one more; returns its number, from 1."""
        self._count += 1
        number = self._count
        words = ["--address", self.address]
        if number == 1:
            words = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
            words += [f"--ray-client-server-port={free_port()}"]
        first = 20000 + 1000 * number + os.getpid() % 20 * 100
        words += [
            *("--node-ip-address=127.0.0.1", f"--num-cpus={self.cpus}", "--object-store-memory=100000000"),
            *(f"--min-worker-port={first}", f"--max-worker-port={first + 99}", "--disable-usage-stats", "--block"),
            *(f"--metrics-export-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"),
        ]
        quick = {
            f"RAY_health_check_{name}": str(value)
            for name, value in {
                "initial_delay_ms": 1000,
                "period_ms": 1000,
                "timeout_ms": 5000,
                "failure_threshold": 3,
            }.items()
        }
        surroundings = {
            **os.environ,
            **quick,
            **self.environment,
            "RAY_NODE_OF_TEST": f"{self.folder}:{number}",
        }
        console = self.folder / f"node-{number}.console"
        for _ in range(3):  # Ray gives its own processes 30 s, which a busy machine may need to read them
            with console.open("wb") as log:
                self._nodes[number] = subprocess.Popen(
                    [str(BIN / "ray"), "start", *words],
                    env=surroundings,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.wait(lambda: "runtime started" in console.read_text() or self._ended(number), f"node {number}")
            if not self._ended(number):
                return number
        raise AssertionError(f"node {number} does not start\n{self.logs()}")

    def _ended(self, number: int) -> bool:
        return self._nodes[number].poll() is not None

    def wait(self, condition: Callable[[], Any], what: str, within: float = PATIENCE) -> Any:
        """The first true answer of `condition`."""
        deadline = time.monotonic() + within
        while not (answer := condition()):
            assert time.monotonic() < deadline, f"never: {what}\n{self.logs()}"
            time.sleep(0.1)
        return answer

    def kill_node(self, number: int) -> None:
        """As when the power goes: everything of it at once, without a word."""
        pids = [self._nodes.pop(number).pid, *self.processes(number)]
        for what in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, what)

    def drain_node(self, number: int, seconds: int) -> None:
        """As when a cloud wants a machine back, in so many seconds."""
        text = b" ".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.processes(number))
        node = re.search(rb"--node[-_]id=(\w+)", text)
        assert node, text
        words = [
            f"--address={self.address}",
            f"--node-id={node[1].decode()}",
            f"--deadline-remaining-seconds={seconds}",
        ]
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        command = [str(BIN / "ray"), "drain-node", *words, *reason]
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stderr

    def processes(self, number: int | None = None) -> list[int]:
        """Everything alive of one node, or of all."""
        found = []
        mark = f"RAY_NODE_OF_TEST={self.folder}:{'' if number is None else number}"
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    marks = (entry / "environ").read_bytes().split(b"\0")
                    ours = any(
                        item == mark.encode() or (number is None and item.startswith(mark.encode())) for item in marks
                    )
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if ours and state != "Z":
                        found.append(int(entry.name))
        return found

    def logs(self) -> str:
        files = sorted(self.folder.glob("*.console"))
        return "".join(f"\n--- {path.name} ---\n{path.read_text(errors='replace')[-2000:]}" for path in files)

    def stop(self) -> None:
        """End everything, by force: there is nothing in it to save."""
        deadline = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for node in self._nodes.values():
            node.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not left, f"left behind by Ray: {left}"
