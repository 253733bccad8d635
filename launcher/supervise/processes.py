"""The ranks of this machine as processes: started, listened to, asked to stop, ended. Imports no torch."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType

from launcher.connect.environment import STORE, usable_cores
from launcher.connect.exit_codes import EXIT_AGAIN
from launcher.connect.rank_job import CONFIG, LAUNCHER, PROOF, WATCHED, Proof, as_text
from launcher.supervise.exit_status import Ended, say
from launcher.supervise.forkserver import ForkedRank, ForkServer, can_fork, preloaded
from launcher.supervise.hang import RankState
from launcher.supervise.heartbeat import state_of
from launcher.supervise.oom_advice import OomKills
from launcher.supervise.rank_channel import RankChannel
from moe_dist.config import Config, ConfigError
from moe_dist.parallel.status import Position
from moe_dist.train.interrupts import Interrupts

LOOPBACK = "127.0.0.1"
POLL = 0.05
STACKS = 0.5
"""Seconds in which ranks write down their stacks."""
HEARING = 2.5
"""Seconds after Ctrl-C in which every rank must have heard of it; a person does not wait for one that hangs."""
GRACE = 1.0
"""Seconds in which the others may notice by themselves that a rank has failed, and write it to their logs."""
PATIENCE = 2.0
"""Seconds between asking a rank to end and ending it."""


class Signals:
    """Notes what the launcher is asked to do instead of being torn out of what it does.

    However many signals come, they are one request, `first`. Only a person who types Ctrl-C again has `insisted`.
    """

    def __init__(self, last_words: bool = False) -> None:
        """`last_words`: this process ends after the block, and no signal must change how any more."""
        self.first: int | None = None
        self.insisted = False
        self._last_words = last_words
        self._interrupts = Interrupts()

    def __enter__(self) -> Signals:
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            before = signal.getsignal(number)
            if before != signal.SIG_IGN:  # as under nohup, or in a script's background
                self._before[number] = before
                signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or number
        if number == signal.SIGINT and self._interrupts.again():
            self.insisted = True

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # Once asked to, this process ends now, and one more signal must not change how: not even while Python ends.
            signal.signal(number, signal.SIG_IGN if self.first or self._last_words else handler)


class Ranks:
    """The processes of one run. Raises ConfigError when the port is taken."""

    def __init__(self, config: Config, proof: Proof | None, job: dict[str, str], server: ForkServer | None) -> None:
        """`job`: the variable with its name. `server` forks them; without one each is a program of its own."""
        count = config.launch.nproc_per_node
        self.processes: list[subprocess.Popen[bytes] | ForkedRank] = []
        self._counted: set[int] = set()
        self.oom_kills = OomKills()
        with _listen(config.launch.master_port) as listener:
            self.board = RankChannel(count)
            shared = rank_environment(config) | {
                **job,
                CONFIG: config.model_dump_json(),
                PROOF: as_text(proof),
                LAUNCHER: str(os.getpid()),
                **self.board.for_children(),
                WATCHED: "1",
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": LOOPBACK,
                "MASTER_PORT": str(listener.getsockname()[1]),
            }
            before = deaf_to_ctrl_c()
            for rank in range(count):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), STORE: ""}
                files = [self.board.theirs, self.board.status]
                if rank == 0:
                    own[STORE] = str(listener.fileno())
                    files.append(listener.fileno())
                command = [sys.executable, "-u", "-m", "moe_dist", "rank"]
                environment = {**os.environ, **shared, **own}
                if server is not None:
                    self.processes.append(server.fork(environment, files))
                else:
                    self.processes.append(subprocess.Popen(command, env=environment, pass_fds=files))
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(self.board.theirs)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        self.board.close()

    @property
    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    @property
    def messages(self) -> dict[int, str]:
        """What went wrong in each rank in its own words, the first to speak first."""
        return self.board.messages

    @property
    def all_have_heard(self) -> bool:
        """Whether every rank knows that it is asked to stop."""
        return len(self.board.heard) == len(self.processes)

    @property
    def positions(self) -> dict[int, Position]:
        """Where each rank was when it last moved; those that have said nothing yet are missing."""
        return self.board.positions

    @property
    def seen(self) -> dict[int, RankState]:
        """All that is known of each rank; those that have said nothing yet are missing."""
        found = {rank: self.board.seen(rank, self.is_stopped) for rank in range(len(self.processes))}
        return {rank: one for rank, one in found.items() if one is not None}

    def is_stopped(self, rank: int) -> bool:
        """Whether somebody has stopped the process (Linux)."""
        return state_of(self.processes[rank].pid) == "T"

    def end_with_stacks(self) -> None:
        """Every rank writes the Python stack of all its threads into its log, and is ended. A stopped one must go on
        for it, and does when the others, with which it would train on, have ended."""
        for process in self.processes:
            process.send_signal(signal.SIGUSR2)
        time.sleep(STACKS)
        stopped = [process for rank, process in enumerate(self.processes) if self.is_stopped(rank)]
        for process in self.processes:
            if process not in stopped:
                process.kill()
        for process in stopped:
            process.send_signal(signal.SIGCONT)
        time.sleep(STACKS if stopped else 0.0)
        self.end()

    def poll(self) -> list[Ended]:
        """Ranks that have ended since the last call."""
        found = []
        for rank, process in enumerate(self.processes):
            code = process.poll()
            if code is not None and rank not in self._counted:
                self._counted.add(rank)
                found.append(Ended(rank, process.pid, code))
        return found

    def ask_to_stop(self, signals: Signals, patience: float) -> None:
        """Let ranks that train finish their step and save it, and others end in their own manner.

        Returns when all have ended, when a person insists, and after `patience` seconds; much sooner when one
        fails on the way, or has not heard of a person's Ctrl-C.
        """
        number = signal.SIGUSR1 if signals.first == signal.SIGUSR1 else signal.SIGTERM
        for process in self.processes:
            if signals.first == signal.SIGINT:
                process.send_signal(signal.SIGINT)  # blocked there: so that the run can say what it was
            process.send_signal(number)
        started, has_said_so = time.monotonic(), False
        deadline = started + patience
        while self.running and time.monotonic() < deadline and not signals.insisted:
            if any(process.poll() not in (None, 0, EXIT_AGAIN) for process in self.processes):
                deadline = min(deadline, time.monotonic() + GRACE)
            waited = time.monotonic() - started
            if signals.first == signal.SIGINT and waited > HEARING:
                if not self.all_have_heard:
                    return
                if not has_said_so:
                    has_said_so = True
                    say("stopping after this step, and saving it; Ctrl-C again stops at once")
            time.sleep(POLL)

    def end(self) -> None:
        """End those that still run, by force."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):  # one that not even the kernel can end yet
                process.wait(PATIENCE)


def deaf_to_ctrl_c() -> set[int]:
    """From now on what this process starts; returns the signals that were blocked before.

    Ranks never hear of Ctrl-C, which a terminal sends to everyone: half-started they would answer with a page of code.
    The launcher hears it, and ends them.
    """
    return signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


class RankStarter:
    """Where a launcher has its ranks from, start after start."""

    def __init__(self, config: Config, proof: Proof | None = None) -> None:
        self.config, self._proof = config, proof
        self._server: ForkServer | None = None

    def __enter__(self) -> RankStarter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._server is not None:
            self._server.close()

    @property
    def server(self) -> ForkServer | None:
        """One that runs, begun now if need be; None where ranks cannot be forked."""
        if not can_fork(self.config):
            return None
        if self._server is None or not self._server.runs:
            before = deaf_to_ctrl_c()
            environment = {**os.environ, **rank_environment(self.config), LAUNCHER: str(os.getpid())}
            self._server = ForkServer(environment, preloaded(self.config, self._proof))
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self._server


def rank_environment(config: Config) -> dict[str, str]:
    """Defaults for ranks that share one machine; what a person has set stays."""
    defaults = {
        "OMP_NUM_THREADS": str(config.launch.num_threads or max(1, usable_cores() // config.launch.nproc_per_node)),
        # bfloat16 matmuls are compiled for every number of rows an expert gets, and kept here.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",
    }
    if sys.platform.startswith("linux"):
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    return {name: value for name, value in defaults.items() if name not in os.environ}


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    try:
        # Ports of a run that has just ended wait a minute for stragglers; they are free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = "in use" if getattr(error, "errno", None) == errno.EADDRINUSE else str(error)
        raise ConfigError(f"launch.master_port={port}: {reason}; choose another, or 0 for a free one") from error
    return listener
