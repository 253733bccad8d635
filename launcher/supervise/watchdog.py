"""A thread in every rank that notices when the run stands still, says whom it waits for, and ends it.

It works however the ranks were started; where our own launcher watches from outside it is not needed. Rank 0 hears of
everybody and decides; who can no longer hear rank 0 decides alone. The thread touches no device and calls no
collective.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from launcher.connect.addresses import addresses
from launcher.connect.environment import Environment
from launcher.connect.exit_codes import EXIT_FAILED
from launcher.connect.rank_job import tell_launcher
from launcher.supervise.collective_trace import Calls
from launcher.supervise.hang import HangDiagnosis, RankState, State, diagnose_hang
from launcher.supervise.heartbeat import Hub, Message, Offer, Peers, Spoke, state_of
from moe_dist.config import Config
from moe_dist.monitor.train_log import log_path
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.status import Position, Status

logger = logging.getLogger("moe_dist")
INTERVAL = 0.5
"""Seconds between two signs of life; more with very many ranks, so that rank 0 hears at most a thousand a second."""
LOSS_WAIT = 2.0
"""Seconds in which a rank that has lost a connection learns who it was that has gone."""
_POLL_INTERVAL = 0.05
_GONE_GRACE = 0.2
"""Seconds before a rank is said to have gone: when a scheduler ends all of them, this one is gone by then too."""
_GAP = 2.0
"""Seconds between two looks that mean that not the others were silent: this process was stopped."""
_STOP_NOTICE = 0.5
"""Seconds in which the others hear that they are to stop, before their connections break."""


class Who(NamedTuple):
    """A rank as people find it."""

    host: str
    address: str
    pid: int
    spaces: tuple[str, str]
    """The machine's boot and its process namespace: where a pid means the same."""
    offer: Offer | None = None


class Watchdog:
    """Started by every rank at the same time (collective); `close` when this rank stops training, whatever for."""

    def __init__(self, config: Config, environment: Environment, mesh: Mesh, status: Status) -> None:
        self.rank, self.status = environment.rank, status
        self._timeout = config.monitor.stall_timeout
        self._interval = max(INTERVAL, environment.world_size / 1000)
        self._folder, self._calls = config.train.output_dir, Calls(mesh.group("pp"))
        alone = environment.local_world_size == environment.world_size
        hub = Hub(environment.world_size, secrets.token_hex(16), alone) if environment.rank == 0 else None
        address = "" if alone else addresses()[0]
        me = Who(socket.gethostname(), address, os.getpid(), _spaces(), hub.offer if hub else None)
        self.everybody: list[Who] = mesh.from_all(me)
        self._peers: Peers | None = hub
        self._went_on = time.monotonic()
        self._reported: set[int] = set()
        self._known, self._lost, self._goodbye = threading.Event(), "", ""
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self, goodbye: str) -> None:
        """This rank stops training: it is `done`, or has `failed` and says why itself."""
        self._goodbye = goodbye
        if self._peers is not None:
            self._peers.wake()
        self._thread.join(LOSS_WAIT)

    def loss(self) -> str:
        """Who has gone or failed first, as somebody says it aloud; waits a moment for the news, "" without any."""
        self._known.wait(LOSS_WAIT)
        return self._lost

    def _run(self) -> None:
        try:
            if self._peers is None:
                self._peers = self._met()
            if self._peers is not None:
                self._watch(self._peers)
        except Exception as error:  # training goes on without
            logger.warning(
                "hangs will not be found: rank %d has no watchdog: %s: %s", self.rank, type(error).__name__, error
            )

    def _watch(self, peers: Peers) -> None:
        due, now = 0.0, time.monotonic()
        while True:
            began = time.monotonic()
            look = began >= due
            if look:
                due = began + self._interval
                peers.send(self._sign_of_life(), must=False)
            peers.poll(max(0.0, due - time.monotonic()))
            time.sleep(_POLL_INTERVAL)  # rank 0 must not wake for each of a thousand messages
            self._listen(peers)
            if self._goodbye:
                self._say_who_has_gone(peers)
                peers.send({"bye": self._goodbye, "rank": self.rank})
                peers.close()
                return
            self._say_who_has_gone(peers, after=_GONE_GRACE)
            verdict = None
            lost_zero = 0 in peers.gone or peers.is_cut_off(0) or self._silence(peers, 0) >= self._timeout
            if look and (self.rank == 0 or lost_zero):
                verdict = diagnose_hang(self._seen(peers), self._timeout, self.name)
            before, now = now, time.monotonic()
            if now - before > 2 * self._interval + _GAP:
                self._went_on = now
            elif verdict is not None:
                self._end(peers, verdict)

    def _met(self) -> Peers | None:
        """The connection to rank 0, which may be slow to answer, or stopped; None when training has ended before."""
        offer, nobody, warned = self.everybody[0].offer, Peers(), False
        assert offer is not None
        while not self._goodbye:
            try:
                return Spoke(self.rank, offer)
            except OSError as error:
                if not warned:
                    logger.warning("rank %d cannot reach rank 0's watchdog, and tries again: %s", self.rank, error)
                warned = True
            if (
                self._is_stopped(0)
                and (verdict := diagnose_hang(self._seen(nobody), self._timeout, self.name)) is not None
            ):
                self._end(nobody, verdict)
            time.sleep(self._interval)
        return None

    def _sign_of_life(self) -> Message:
        position = self.status.position
        seconds = min(position.seconds, time.monotonic() - self._went_on)
        return {"place": position._replace(seconds=seconds), "calls": self._calls.sign}

    def _silence(self, peers: Peers, rank: int) -> float:
        moment = peers.heard[rank][0] if rank in peers.heard else self._went_on
        return time.monotonic() - max(moment, self._went_on)

    def _seen(self, peers: Peers) -> dict[int, RankState]:
        """What is known of everybody who trains; nothing as long as somebody may be about to be heard of first."""
        seen = {self.rank: _sighting(self._sign_of_life(), 0.0, "")}
        unheard = {"place": self.status.position._replace(seconds=0.0, phase="starting", layer=None, longest=0.0)}
        for rank in range(len(self.everybody)) if self.rank == 0 else [0]:
            if rank == self.rank or peers.left.get(rank) == "done":
                continue
            silence = self._silence(peers, rank)
            if rank not in peers.heard and silence < self._timeout:
                return {}
            state: State = "gone" if rank in peers.gone or rank in peers.left else ""
            if not state and silence > 2 * self._interval and self._is_stopped(rank):
                state = "stopped"
            if not state and peers.is_cut_off(rank):
                state = "cut"
            _, message = peers.heard.get(rank, (0.0, unheard))
            seen[rank] = _sighting(message, silence, state)
        return seen

    def _listen(self, peers: Peers) -> None:
        while peers.messages:
            message = peers.messages.pop(0)
            if "end" in message and self.rank != 0:
                tell_launcher(self.rank, str(message["end"]))
                self._leave(str(message["end"]), message.get("ranks", []))
            if "lost" in message:
                self._lose(peers, str(message["lost"]))
            elif message.get("bye") == "failed":
                rank = int(message["rank"])
                self._lose(peers, f"{self.name(rank)} has failed; log: {log_path(self._folder, rank)}")

    def _lose(self, peers: Peers, text: str) -> bool:
        """The first loss is news, for every rank; what comes after is its consequence."""
        if self._known.is_set():
            return False
        self._lost = text
        self._known.set()
        if self.rank == 0:
            peers.send({"lost": text})
        return True

    def _say_who_has_gone(self, peers: Peers, after: float = 0.0) -> None:
        """One line, from rank 0, or where nobody can hear it any more from one rank of each host."""
        for rank, since in peers.gone.items():
            if rank not in self._reported and time.monotonic() - since >= after:
                self._reported.add(rank)
                where = _sighting(peers.heard[rank][1], 0.0, "gone").where if rank in peers.heard else "at its start"
                text = f"{self.name(rank)} has gone, last seen {where}: it ended without a word "
                text += f"(killed, crashed, or its host is lost); log: {log_path(self._folder, rank)}"
                if self._lose(peers, text):
                    self._speak(text)

    def _speak(self, text: str, about: Sequence[int] = ()) -> None:
        """One line, or word for whoever has started this rank, `about` ranks that cannot say it themselves."""
        mine = self.everybody[self.rank]
        here = [rank for rank, who in enumerate(self.everybody) if rank and who[:2] == mine[:2]]
        if self.rank != 0 and self.rank != here[0]:
            return
        if [rank for rank in (self.rank, *about) if not tell_launcher(rank, text)]:
            os.write(2, f"moe-dist: error: {text}\n".encode())

    def _end(self, peers: Peers, verdict: HangDiagnosis) -> NoReturn:
        whose = "all ranks stop" if self.rank == 0 else "the ranks that cannot hear it stop"
        log = log_path(self._folder, verdict.ranks[0])
        text = f"{verdict.text}; {whose}; log: {log}"
        peers.send({"end": text, "ranks": verdict.ranks})
        self._speak(text, [rank for rank in verdict.ranks if rank != self.rank])
        self._leave(text, verdict.ranks)

    def _leave(self, text: str, ranks: list[int]) -> NoReturn:
        """Write down the Python stacks and end this process, whatever its other threads do. What is stopped on this
        machine writes them too, and is ended: it would keep everybody waiting once more."""
        with suppress(OSError), log_path(self._folder, self.rank).open("a") as file:
            file.write(f"moe-dist: error: {text}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        stopped = [self.everybody[rank].pid for rank in ranks if rank != self.rank and self._is_stopped(rank)]
        for number, seconds in ((signal.SIGUSR2, 0.0), (signal.SIGCONT, _STOP_NOTICE), (signal.SIGKILL, 0.0)):
            for pid in stopped:
                with suppress(OSError):
                    os.kill(pid, number)
            time.sleep(seconds)
        os._exit(EXIT_FAILED)

    def _is_stopped(self, rank: int) -> bool:
        who = self.everybody[rank]
        return who.spaces == self.everybody[self.rank].spaces and state_of(who.pid) == "T"

    def name(self, rank: int) -> str:
        """A rank as people find it."""
        who = self.everybody[rank]
        return f"rank {rank} (pid {who.pid} on {who.host}{', ' if who.address else ''}{who.address})"


def _sighting(message: Message, silence: float, state: State) -> RankState:
    return RankState(Position(*message["place"]), silence, state, **message.get("calls", {}))


def _spaces() -> tuple[str, str]:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), ""
