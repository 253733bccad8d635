"""Ranks on this machine: start them, watch them, end them all when one fails. Imports no torch.

The launcher is a parent and nothing else, so that it can always answer: a rank may sit in a collective for
minutes, the launcher never does. It opens the port of the rendezvous itself and hands it to rank 0 already
open: nobody can take it in between, a taken one is found at once, and only this machine can connect.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from types import FrameType
from typing import NamedTuple

from launcher.environment import usable_cores
from launcher.worker import (
    CONFIG,
    EXIT_AGAIN,
    EXIT_CONFIG,
    EXIT_DIFFERS,
    EXIT_FAILED,
    EXIT_STOPPED,
    LAUNCHER,
    PROOF,
    REPORTS,
    STORE,
    Proof,
)
from moe_dist.config import Config
from moe_dist.config_loading import ConfigError
from moe_dist.monitor.train_log import log_path

LOOPBACK = "127.0.0.1"
POLL = 0.05
HEARING = 2.5
"""Seconds after Ctrl-C in which every rank must have heard of it; a person does not wait for one that hangs."""
GRACE = 1.0
"""Seconds in which the others may notice by themselves that a rank has failed, and write it to their logs."""
PATIENCE = 2.0
"""Seconds between asking a rank to end and ending it."""


class Ended(NamedTuple):
    """A rank that has ended by itself. `code`: as in subprocess, negative for a signal."""

    rank: int
    pid: int
    code: int


def launch(config: Config, proof: Proof | None = None) -> int:
    """Start `launch.nproc_per_node` ranks, wait for all of them, return the exit code.

    They train, or with `proof` they verify.

    When one rank fails the others are ended, and one line says which, how and where its log is.
    """
    with Signals() as signals, Ranks(config, proof) as ranks:
        ended: list[Ended] = []
        deadline = None
        while ranks.running and not signals.first:
            ended += ranks.poll()
            if deadline is None and any(end.code for end in ended):
                deadline = time.monotonic() + GRACE
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(POLL)
        # Whoever failed in this very moment is still a cause, not a casualty.
        ended += ranks.poll()
        if signals.first:
            ranks.ask_to_stop(signals, config.launch.grace_period)
            ranks.end()
            return _interrupted(signals.first, ranks)
        ranks.ask_to_stop(signals, PATIENCE)
        ranks.end()
        return _verdict([end for end in ended if end.code], ranks, config)


class Signals:
    """Notes what the launcher is asked to do instead of being torn out of what it does."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.count = 0

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
        self.count += 1

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Ranks:
    """The processes of one run. Raises ConfigError when the port is taken."""

    def __init__(self, config: Config, proof: Proof | None = None) -> None:
        count = config.launch.nproc_per_node
        self.processes: list[subprocess.Popen[bytes]] = []
        self._counted: set[int] = set()
        self._told: dict[int, str] = {}
        self._heard: set[int] = set()
        self._unread = b""
        with _listen(config.launch.master_port) as listener:
            self._reports, theirs = os.pipe()
            os.set_blocking(self._reports, False)
            shared = rank_environment(config) | {
                CONFIG: config.model_dump_json(),
                PROOF: json.dumps(proof and asdict(proof)),
                LAUNCHER: str(os.getpid()),
                REPORTS: str(theirs),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": LOOPBACK,
                "MASTER_PORT": str(listener.getsockname()[1]),
            }
            # Ranks never hear of Ctrl-C, which a terminal sends to everyone: half-started they would answer with
            # a page of code. The launcher hears it, and ends them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            for rank in range(count):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                files = [theirs]
                if rank == 0:
                    own[STORE] = str(listener.fileno())
                    files.append(listener.fileno())
                command = [sys.executable, "-u", "-m", "launcher.worker"]
                environment = {**os.environ, **shared, **own}
                self.processes.append(subprocess.Popen(command, env=environment, pass_fds=files))
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(theirs)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        os.close(self._reports)

    @property
    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    @property
    def told(self) -> dict[int, str]:
        """What went wrong in each rank in its own words, the first to speak first."""
        with suppress(BlockingIOError):
            while data := os.read(self._reports, 65536):
                self._unread += data
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            rank, text = json.loads(line)
            if text is None:
                self._heard.add(rank)
            else:
                self._told.setdefault(rank, text)
        return self._told

    @property
    def all_have_heard(self) -> bool:
        """Whether every rank knows that it is asked to stop."""
        return bool(self.told is not None and len(self._heard) == len(self.processes))

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

        Returns when all have ended, when a person asks twice, and after `patience` seconds; much sooner when one
        fails on the way, or has not heard of a person's Ctrl-C.
        """
        number = signal.SIGUSR1 if signals.first == signal.SIGUSR1 else signal.SIGTERM
        for process in self.processes:
            process.send_signal(number)
        started, told_person = time.monotonic(), False
        deadline = started + patience
        while self.running and time.monotonic() < deadline and signals.count < 2:
            if any(process.poll() not in (None, 0, EXIT_AGAIN) for process in self.processes):
                deadline = min(deadline, time.monotonic() + GRACE)
            waited = time.monotonic() - started
            if signals.first == signal.SIGINT and waited > HEARING:
                if not self.all_have_heard:
                    return
                if not told_person:
                    told_person = True
                    _say("stopping after this step, and saving it; Ctrl-C again stops at once")
            time.sleep(POLL)

    def end(self) -> None:
        """End those that still run, by force."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):  # one that not even the kernel can end yet
                process.wait(PATIENCE)


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


def _interrupted(number: int, ranks: Ranks) -> int:
    """Say what has come of it. All ranks that were training end alike: on request, saved."""
    _restore_terminal()
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    codes = {process.returncode for process in ranks.processes}
    told = ranks.told.get(0, "")
    if codes == {EXIT_AGAIN}:
        _, _, after = told.partition(" after ")
        _say(f"stopped by {name} after {after}" if after else f"stopped by {name}")
        return 128 + number if number == signal.SIGINT else EXIT_AGAIN
    if codes == {EXIT_STOPPED}:
        return EXIT_STOPPED  # rank 0 has said why
    if codes == {0}:
        return 0  # it was at its end anyway
    _say(f"stopped by {name}; every process has ended")
    return 128 + number


def _verdict(failed: list[Ended], ranks: Ranks, config: Config) -> int:
    """Say what went wrong first. A rank ended from outside is the cause, whatever its peers said before."""
    if not failed:
        return 0
    _restore_terminal()
    alone, told = config.launch.nproc_per_node == 1, ranks.told
    # Not SIGABRT: that is how libraries give up when a peer is gone.
    killed = [end for end in failed if end.code < 0 and end.code != -signal.SIGABRT]
    spoke = [end for rank in told for end in failed if end.rank == rank]
    cause = (killed or spoke or failed)[0]
    who = f"the process (pid {cause.pid})" if alone else f"rank {cause.rank} (pid {cause.pid})"
    others = "" if alone else "; the other ranks were stopped"
    log = f"; log: {log_path(config.train.output_dir, cause.rank)}"
    if cause.code == EXIT_AGAIN:
        _say(told.get(0, "stopped on request"))
        return EXIT_AGAIN
    if cause.code < 0:
        name = signal.Signals(-cause.code).name
        hint = ", by someone or for want of memory" if name == "SIGKILL" else ""
        _say(f"error: {who} was ended by {name}{hint}{others}{log}")
        return EXIT_FAILED
    if cause.rank in told:
        _say(f"error: {told[cause.rank]}")
    elif cause.code not in (EXIT_STOPPED, EXIT_DIFFERS):
        _say(f"error: {who} ended with exit code {cause.code}{others}{log}")
    return cause.code if cause.code in (EXIT_CONFIG, EXIT_STOPPED, EXIT_DIFFERS) else EXIT_FAILED


def _say(text: str) -> None:
    print(f"moe-dist: {text}", file=sys.stderr, flush=True)


def _restore_terminal() -> None:
    """Rank 0 may have ended with its cursor hidden, in the middle of a line."""
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        print("\x1b[?25h", flush=True)
