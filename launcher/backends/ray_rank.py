"""What each worker of Ray Train does: start one rank as a process, and stay its parent.

The rank is the process that every launcher of ours starts (`launcher.rank.worker`), with the same variables, exit codes
and signals; the worker listens to it as the local launcher does, and dies with it, or it with the worker. Imports no
torch.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.connect.environment import STORE, TOKEN
from launcher.connect.exit_codes import EXIT_AGAIN, EXIT_CONFIG, EXIT_STOPPED
from launcher.connect.handshake import BIND, listen
from launcher.connect.rank_job import CONFIG, LAUNCHER
from launcher.connect.secret import SECRET
from launcher.supervise.oom_advice import OomKills
from launcher.supervise.processes import GRACE, LOOPBACK, POLL
from launcher.supervise.rank_channel import RankChannel
from moe_dist.config import Config
from moe_dist.monitor.train_log import log_path
from moe_dist.plan.elastic import replan

TICK = 1.0
"""Seconds between two looks at what is asked of the run."""
LEAVING = 30.0
"""Seconds a rank has to end once rank 0 has ended well."""
BEFORE_TRAINING = (128 + signal.SIGTERM, 128 + signal.SIGUSR1)
FINAL = (EXIT_CONFIG, EXIT_STOPPED, EXIT_AGAIN, 128 + signal.SIGINT, *BEFORE_TRAINING)
"""Exit codes after which starting again would be of no use, or is not wanted."""


class RankFailed(Exception):
    """A rank that has ended as it should not. `cause`: of the others' failures, as when it was ended from outside."""

    def __init__(self, text: str, cause: bool) -> None:
        super().__init__(text, cause)
        self.text, self.cause = text, cause


class Mailbox:
    """Where the command and the ranks leave word for each other: an actor on the command's node."""

    def __init__(self) -> None:
        self._said: list[tuple[int, bytes]] = []
        self._last_seen = time.monotonic()
        self._signal: int | None = None
        self._heard = False
        self._end: tuple[int, str | None] | None = None
        self._leaving = False

    def say(self, stream: int, text: bytes) -> None:
        """For standard output (1) or error (2) of the command."""
        self._said.append((stream, text))

    def news(self) -> tuple[list[tuple[int, bytes]], float]:
        """What has been said since the last call, and for how many seconds nobody has been here."""
        said, self._said = self._said, []
        return said, time.monotonic() - self._last_seen

    def ask_to_stop(self, number: int) -> None:
        self._signal = number

    def asked(self) -> int | None:
        """The signal that the command was sent; asked by rank 0's worker."""
        self._last_seen = time.monotonic()
        self._heard = self._heard or self._signal is not None
        return self._signal

    def heard(self) -> bool:
        return self._heard

    def node_leaves(self) -> None:
        """A node is being taken away: the ranks save, to be started again elsewhere."""
        self._leaving = True

    def tell(self, code: int, text: str | None) -> None:
        """How the run has ended; the first to speak is right, and of those who agree the one with words."""
        if self._end is None or self._end == (code, None):
            self._end = code, text

    def outcome(self) -> tuple[int, str | None] | None:
        return self._end

    def goes_on(self) -> bool:
        """Whether the run was stopped only because a node is taken away; forgotten once asked."""
        stopped = self._end is not None and self._end[0] in (EXIT_AGAIN, *BEFORE_TRAINING)
        again = self._leaving and stopped and self._signal is None
        if again:
            self._end, self._leaving = None, False
        return again


class Rank:
    """One rank as a process of its own."""

    def __init__(self, number: int, config: Config, variables: dict[str, str], listener: Any, job: dict) -> None:
        self.number, self._config, self._oom_kills = number, config, OomKills()
        self._local = int(variables["LOCAL_RANK"])
        self._board = RankChannel(int(variables["LOCAL_WORLD_SIZE"]))
        own = {
            CONFIG: config.model_dump_json(),
            LAUNCHER: str(os.getpid()),
            **self._board.for_children(),
            STORE: "" if listener is None else str(listener.fileno()),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "moe_dist", "rank"],
            env={**os.environ, **variables, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[self._board.theirs, self._board.status, *([] if listener is None else [listener.fileno()])],
            cwd=job["folder"],
        )
        os.close(self._board.theirs)
        self.asked: int | None = None
        self._readers = [
            threading.Thread(target=_pass_on, args=(file, stream, job["mailbox"]), daemon=True)
            for stream, file in ((1, self.process.stdout), (2, self.process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def ask_to_stop(self, number: int) -> None:
        """Once: the step in hand is finished and saved."""
        if self.asked is None:
            self.asked = number
            self.process.send_signal(number)

    @property
    def message(self) -> str | None:
        """What went wrong, in the rank's own words."""
        return self._board.messages.get(self.number)

    def failure(self) -> RankFailed:
        code, text = self.process.returncode, self.message
        log = log_path(self._config.train.output_dir, self.number)
        if text is not None:
            return RankFailed(text, cause=len(self._board.messages) > 1)  # of another rank, too
        position = self._board.positions.get(self._local)
        where = f" {position}" if position is not None and position.step else ""
        who = f"rank {self.number} (pid {self.process.pid} on {socket.gethostname()})"
        if code < 0:
            name = signal.Signals(-code).name
            hint = self._oom_kills.why_killed() if name == "SIGKILL" else ""
            # Not SIGABRT: that is how libraries give up when a peer is gone.
            return RankFailed(f"{who} was ended by {name}{where}{hint}; log: {log}", code != -signal.SIGABRT)
        return RankFailed(f"{who} ended with exit code {code}{where}; log: {log}", False)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(GRACE)
        self._board.close()


def _pass_on(file: Any, stream: int, mailbox: Any) -> None:
    """What a rank prints goes to the terminal of the command."""
    with file:
        while text := file.read1(65536):
            mailbox.say.remote(stream, text)


def run(job: dict[str, Any]) -> None:
    """The function that Ray Train calls on every worker; `job` comes from `ray_driver`.

    It returns when there is nothing more to do for this start of the run, for better or worse, having told the mailbox;
    it raises RankFailed when Ray is to start the workers again.
    """
    import ray
    import ray.train

    mailbox, context = job["mailbox"], ray.train.get_context()
    if ray.get(mailbox.outcome.remote()) is not None:
        return
    worker, workers = context.get_world_rank(), context.get_world_size()
    world_size = max(number for number in job["worlds"] if number <= workers)
    per_host = context.get_local_world_size()
    config, sentence = replan(Config.model_validate_json(job["config"]), world_size, job["batch"], per_host=per_host)
    met, listener = _meet(context, world_size)
    if worker == 0:
        waiting = (
            f"{workers - world_size} of {workers} workers wait: no layout fits more" if world_size < workers else None
        )
        for text in filter(None, (sentence, waiting)):
            mailbox.say.remote(2, f"note: {text}\n".encode())
    if worker >= world_size:
        _accompany(None, mailbox, config)
        return
    # The workers of a node have numbers in a row, and the last node may be used in part.
    first = worker - context.get_local_rank()
    here = min(context.get_local_world_size(), world_size - first)
    variables = {
        **_defaults(config, here == world_size),
        **job["environment"],
        "RANK": str(worker),
        "LOCAL_RANK": str(context.get_local_rank()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": job["environment"].get("MASTER_ADDR", met["address"]),
        "MASTER_PORT": str(met["port"]),
        TOKEN: met["token"],
        SECRET: met["token"],
    }
    rank = Rank(worker, config, variables, listener, job)
    if listener is not None:
        listener.close()
    try:
        _accompany(rank, mailbox, config)
    finally:
        rank.close()


def _meet(context: Any, world_size: int) -> tuple[dict[str, Any], socket.socket | None]:
    """Where rank 0 serves, and there its open port (collective)."""
    import ray
    from ray.train.collective import broadcast_from_rank_zero

    offer = listener = None
    if context.get_world_rank() == 0:
        one_machine = context.get_local_world_size() >= world_size
        address = LOOPBACK if one_machine else ray.util.get_node_ip_address()
        listener = listen(address if one_machine else os.environ.get(BIND) or address)
        offer = {"address": address, "port": listener.getsockname()[1], "token": secrets.token_hex(16)}
    met: dict[str, Any] = broadcast_from_rank_zero(offer)
    return met, listener


def _defaults(config: Config, one_machine: bool) -> dict[str, str]:
    """For variables that nobody has set."""
    defaults = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192"}
    if config.launch.num_threads:
        defaults["OMP_NUM_THREADS"] = str(config.launch.num_threads)
    if one_machine and sys.platform.startswith("linux"):
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    return {name: value for name, value in defaults.items() if name not in os.environ or name == "OMP_NUM_THREADS"}


def _accompany(rank: Rank | None, mailbox: Any, config: Config) -> None:
    """Until the run has ended (rank None: a worker that waits): pass on what is asked, tell Ray of the progress."""
    import ray

    over: float | None = None  # since when rank 0 has ended for good
    next_tick, has_reported = 0.0, False
    while True:
        code = rank.process.poll() if rank is not None else None
        if rank is not None and rank.asked is not None and code == -rank.asked:
            code = 128 + rank.asked  # before it was training: there was nothing to save
        if rank is not None and code in FINAL:
            if not has_reported:
                ray.get(mailbox.tell.remote(code, rank.message))
            has_reported = True
        elif rank is not None and code:
            failure = rank.failure()
            # Ray is to hear first of a rank that can say what is wrong with another, then of one that was killed, and
            # last of those that failed because of it.
            time.sleep((0 if code > 0 else GRACE) if failure.cause else 2 * GRACE)
            if code > 0 and ray.get(mailbox.outcome.remote()) is not None:  # another has an answer for good
                return
            raise failure
        first_is_over = rank is not None and rank.number == 0 and code is not None
        if over is None and (first_is_over or time.monotonic() >= next_tick):
            over = time.monotonic() if _tick(rank, mailbox, config, first_is_over) else None
            next_tick = time.monotonic() + TICK
        if over is not None and (rank is None or code is not None or time.monotonic() > over + LEAVING):
            return
        time.sleep(POLL)


def _tick(rank: Rank | None, mailbox: Any, config: Config, first_is_over: bool) -> bool:
    """What rank 0's worker has to say, to all (collective): whether the run has ended."""
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    word = None
    if rank is not None and rank.number == 0:
        word = {"over": first_is_over, "asked": ray.get(mailbox.asked.remote()), **last_step(config.train.output_dir)}
    word = broadcast_from_rank_zero(word)
    leaving = ray.train.get_preemption_info()
    if leaving is not None and not word["over"]:
        ray.get(mailbox.node_leaves.remote())
    if rank is not None and (word["asked"] is not None or leaving is not None):
        rank.ask_to_stop(signal.SIGUSR1 if word["asked"] == signal.SIGUSR1 else signal.SIGTERM)
    if "loss" in word:
        ray.train.report({"step": word["step"], "loss": word["loss"]})
    return bool(word["over"])


def last_step(run_folder: Path) -> dict[str, Any]:
    """Step and loss of the last line about training in metrics.jsonl; nothing before there is one."""
    with suppress(OSError, ValueError), (run_folder / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and row.get("kind") == "train":
                    return {"step": row["step"], "loss": row["loss"]}
    return {}
