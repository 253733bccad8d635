"""Ranks forked from a process that has imported what they need, so that a start, and a start again, costs no imports.

The process (`launcher.rank.forkserver`) forks twice, and the launcher adopts what comes out: a rank is the launcher's
own child, as if it had been started like any other program. Linux, and without CUDA, which is of no use in a fork of a
process that has looked for devices. Imports no torch.
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from launcher.connect.rank_job import FORKED, PRELOADED, Proof
from moe_dist.config import Config

_PR_SET_CHILD_SUBREAPER = 36
_POLL = 0.01


def can_fork(config: Config) -> bool:
    """Whether ranks of this run can be forked."""
    return sys.platform.startswith("linux") and (config.launch.device == "cpu" or not glob.glob("/dev/nvidia[0-9]*"))


def preloaded(config: Config, proof: Proof | None) -> list[str]:
    """What ranks of this run are sure to import beside what all ranks do: once here, instead of in each of them."""
    adafactor = ["moe_dist.parallel.engines.adafactor"]
    if type(proof) is Proof:
        asked, designed = proof.layouts, proof.layouts in ("all", "quick")
        modules = adafactor if designed or asked == "life" or "adafactor" in asked else []
        compiler = ["torch._inductor.compile_fx"] if designed or "compiled" in asked else []
        return ["torch._dynamo", "moe_dist.verify.run", *modules, *compiler]
    parallel, modules = config.parallel, []
    if config.optimizer.optim == "adafactor":
        modules += adafactor
    if config.train.torch_compile:
        modules.append("torch._dynamo")
    if config.launch.nproc_per_node > 1:  # a single rank imports it when it saves or reads: half a second
        modules.append("moe_dist.checkpoint.state")
    if parallel.pp_size > 1:
        modules.append("moe_dist.parallel.pipeline")
    if parallel.zero_stage and parallel.engine == "torch" and config.launch.nproc_per_node > 1:
        modules.append("moe_dist.parallel.engines.fsdp")
    return modules


class ForkServer:
    """The process, for as many starts as a launcher makes."""

    def __init__(self, environment: dict[str, str], modules: Sequence[str] = ()) -> None:
        """`environment`: of every rank that it will fork, but for what one start or one rank is told. `modules`: as
        `preloaded` gives them.
        """
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        command = [sys.executable, "-u", "-m", "moe_dist", "forkserver"]
        environment = environment | {FORKED: str(theirs.fileno()), PRELOADED: " ".join(modules)}
        self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        self._waiting: list[ForkedRank] = []

    @property
    def runs(self) -> bool:
        """Whether it can fork more."""
        return self._process.poll() is None

    def fork(self, environment: dict[str, str], files: Sequence[int]) -> ForkedRank:
        """A rank with this environment, and these open files under the numbers they have here."""
        message = json.dumps({"environment": environment, "files": list(files)}).encode()
        rank = ForkedRank(self)
        # The kernel queues 200 kB of these; with many ranks this waits until the imports are done.
        self._socket.setblocking(True)
        with suppress(BrokenPipeError, ConnectionResetError):  # it has gone, as the rank will hear
            socket.send_fds(self._socket, [message], files)
        self._socket.setblocking(False)
        self._waiting.append(rank)
        return rank

    def hear(self) -> None:
        """Process ids of ranks that have been forked since; of a server that has gone, its end is theirs."""
        while self._waiting:
            try:
                answer = self._socket.recv(64)
            except BlockingIOError:
                return
            except OSError:
                answer = b""
            if not answer:
                code = self._process.wait()
                for rank in self._waiting:
                    rank.pid, rank.returncode = self._process.pid, code or 1
                self._waiting.clear()
                return
            self._waiting.pop(0).pid = int(answer)

    def end(self) -> None:
        """End it, by force; ranks that it has forked are not its own."""
        self._process.kill()
        self._process.wait()
        self.hear()

    def close(self) -> None:
        """End it, and forget it."""
        self.end()
        self._socket.close()


class ForkedRank:
    """What `subprocess.Popen` is for a program, for a rank. `pid` is 0 until it has been forked; of one that
    never was it is the server's."""

    def __init__(self, server: ForkServer) -> None:
        self.pid, self._server = 0, server
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, minus the signal that has ended it; None while it runs."""
        if not self.pid and self.returncode is None:
            self._server.hear()
        if self.pid and self.returncode is None:
            with suppress(ChildProcessError):  # until the server's own child has gone it is not ours
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As to a program that has just been started: before it has been forked, most signals end it."""
        if self.poll() is not None:
            return
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)
        elif number in (signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1):
            self._server.end()

    def kill(self) -> None:
        """End it, by force."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        """The exit code. Raises `subprocess.TimeoutExpired`."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(_POLL)
        return code
