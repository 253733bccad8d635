"""`python -m moe_dist agent ...`: torchrun, with torchrun's own options, as the parent of a machine's ranks.

What differs from torchrun:
- It ends with the exit code of its ranks, where torchrun ends with 1 whatever they say: "saved, start me again" is
  something else than "useless to try again".
- SIGTERM, SIGUSR1, SIGHUP and Ctrl-C go to the ranks and leave them the time they need to save (`--shutdown-timeout`
  seconds; without it any).
- One line says which rank has failed, how, and where it was; the same line as under `moe-dist train`.
- Ranks that saved because they were asked to, or whose configuration cannot be used, are not started again, and
  `--max-restarts` counts starts that got no further than a checkpoint, not all.
- It ends when its ranks have failed and the rendezvous does not answer; torchrun waits for TCP.
- Machines meet at a port that only this job's agents can use (`launcher.connect.rendezvous`).
Everything else, rules of rendezvous, restarts, agents that come and go, is torchrun's. Imports torch in `main` only.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.connect.environment import JOB, named_job
from launcher.connect.exit_codes import EXIT_AGAIN, EXIT_CONFIG, EXIT_CTRL_C, EXIT_FAILED, EXIT_STOPPED
from launcher.connect.rank_job import LAUNCHER
from launcher.supervise.exit_status import Ended, Tries, note, say, say_end, verdict
from launcher.supervise.oom_advice import OomKills
from launcher.supervise.rank_channel import RankChannel
from moe_dist.config import Config, ConfigError, load_config
from moe_dist.train.interrupts import Interrupts

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_FINAL = (EXIT_CONFIG, EXIT_STOPPED, EXIT_AGAIN, EXIT_CTRL_C)
"""Exit codes of ranks after which the same start again would not help, or is not wanted."""
_LAST_WAIT = 10.0
"""Seconds for which an agent whose ranks are done waits for the others."""
_BLOCKED_LIMIT = 10.0
"""Seconds without a look at ranks that have failed: torch asks the rendezvous something, and its link is cut."""


def main(arguments: list[str]) -> int:
    asked = Asked()  # first of all: importing torch takes a while, and process 1 has no default actions
    try:
        return _main(arguments, asked)
    finally:
        asked.close()


def _main(arguments: list[str], asked: Asked) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import (
        RendezvousClosedError,
        RendezvousError,
        RendezvousGracefulExitError,
    )
    from torch.distributed.run import parse_args, run

    from launcher.connect.rendezvous import install

    if os.environ.get("MOE_DIST_DEBUG") != "1":  # our line says the same, and where
        for name in ("multiprocessing.api", "agent.server.api", "rendezvous.dynamic_rendezvous"):
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    # Not to be without any; this one stays torchrun's.
    options = parse_args(["--signals-to-handle=SIGQUIT", *arguments])
    asked.patience = options.shutdown_timeout
    endpoint = options.rdzv_endpoint or f"{options.master_addr}:{options.master_port}"
    few, _, many = str(options.nnodes).partition(":")
    _set_to_watch(Watch(_config(options), asked, elastic=bool(many) and few != many))
    try:
        install(options)
        run(options)
    except ChildFailedError as error:
        code = one_code(failure.exitcode for failure in error.failures.values())
        return EXIT_CTRL_C if asked.number == signal.SIGINT and code == EXIT_AGAIN else code
    except SignalException:
        return EXIT_AGAIN
    except RendezvousGracefulExitError:
        say("the run has ended without this machine")
    except RendezvousClosedError:
        say("error: the agent of another machine has ended the run")
        return EXIT_FAILED
    except RendezvousError as error:
        text = " ".join(f"{error} {error.__cause__ or ''}".split()) or type(error).__name__
        say(f"error: --rdzv-endpoint {endpoint}: the machines cannot meet there: {text}")
        return EXIT_FAILED
    except ConfigError as error:
        say(f"error: {error}")
        return EXIT_CONFIG
    except Exception as error:
        if os.environ.get("MOE_DIST_DEBUG") == "1":
            raise
        say(f"error: {' '.join(f'{type(error).__name__}: {error}'.split())} (MOE_DIST_DEBUG=1 shows where)")
        return EXIT_FAILED
    return 0


def one_code(codes: Iterable[int]) -> int:
    """One exit code for all ranks that failed: what they mean counts more than who was first."""
    found = list(codes)
    for code in _FINAL:
        if code in found:
            return code
    # Killed by a signal, as a shell says it: 137 is what the kernel does to a pod without memory. SIGTERM is also what
    # torchrun sends to those that have not failed.
    killed = [code for code in found if code < 0]
    if all(code == -signal.SIGTERM for code in killed) and len(killed) < len(found):
        return EXIT_FAILED
    return next((128 - code for code in killed if code != -signal.SIGTERM), 128 + signal.SIGTERM)


def ranks(torchrun: str = "self") -> list[int]:
    """Process ids of the ranks that torchrun has started (Linux)."""
    found = []
    for task in Path(f"/proc/{torchrun}/task").iterdir():
        with suppress(OSError):
            for pid in (task / "children").read_text().split():
                if b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(int(pid))
    return found


class Asked:
    """Signals for the ranks, passed on to them: the first, for all that follow are the same request.

    A thread does it: the main one may wait in a rendezvous, where Python runs no handler for minutes.
    """

    number: int | None = None
    """The first that came."""
    patience: float | None = None
    """Seconds before ranks that have been asked are ended by force; None: whoever asks sees to that."""

    def __init__(self) -> None:
        self._interrupts = Interrupts()
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        for number in PASSED_ON:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """This process ends now: where it was asked to, one more signal must not change how."""
        if self.number is not None:
            for number in PASSED_ON:
                signal.signal(number, signal.SIG_IGN)

    def _listen(self) -> None:
        while True:
            for number in os.read(self._reader, 64):
                if number in PASSED_ON:
                    self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        notified = ranks()
        insists = number == signal.SIGINT and self._interrupts.again()
        if self.number is not None:
            if insists:
                _send(signal.SIGKILL, notified)
            return
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        say(f"{name}, passed on to the ranks of this machine: {len(notified)}")
        if not notified:
            os._exit(128 + number)  # nothing has begun, there is nothing to save
        # On a terminal they have heard of Ctrl-C by themselves, and hearing of it twice would cut off their save.
        _send(signal.SIGTERM if number == signal.SIGINT else number, notified)
        if self.patience is not None:
            timer = threading.Timer(self.patience, lambda: _send(signal.SIGKILL, ranks()))
            timer.daemon = True
            timer.start()
        self.number = number


def _send(number: int, pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class Watch:
    """Says what has become of the ranks of this machine, and decides whether they are started again.

    `elastic`: machines may leave and come.
    """

    def __init__(self, config: Config | None, asked: Asked, elastic: bool) -> None:
        self.config, self.asked, self.elastic = config, asked, elastic
        self.board: RankChannel | None = None
        self.tries: Tries | None = None
        self.oom_kills = OomKills()
        self.looked: float | None = None
        """When torch last saw all ranks of this machine running; None while it starts or ends them."""

    def begin(self, agent: Any) -> None:
        """Ranks are about to be started, the first or others in their place."""
        self.oom_kills = OomKills()
        if self.board is not None:
            self.board.clear()
            return
        spec = agent.get_worker_group().spec
        self.board = RankChannel(spec.local_world_size)
        os.environ.update(self.board.for_strangers() | named_job())
        if self.config is not None:
            os.environ[LAUNCHER] = str(os.getpid())  # of ranks that are its children: with no script in between
        if self.config is not None and spec.max_restarts:
            self.tries = Tries(self.config, spec.max_restarts, os.environ[JOB])
        threading.Thread(target=self._end_when_deaf, args=(self.board,), daemon=True).start()
        # Ranks end together; an agent that has died does not come to the last meeting.
        agent._exit_barrier_timeout = min(agent._exit_barrier_timeout, _LAST_WAIT)

    def _end_when_deaf(self, board: RankChannel) -> None:
        """Say what a rank has said, and end this process, when nobody else will: torch may wait for an answer of a
        host that is cut off until TCP gives up, a quarter of an hour."""
        while self.looked is None or time.monotonic() - self.looked < _BLOCKED_LIMIT or not board.messages:
            time.sleep(0.5)
        say(f"error: {next(iter(board.messages.values()))}")
        say("error: the rendezvous does not answer any more: this machine ends")
        os._exit(EXIT_FAILED)

    def failed(self, agent: Any, failures: dict[int, Any]) -> None:
        """Ranks of this machine have failed: say so, and set how often they may still be started again."""
        from torch.distributed.elastic.multiprocessing import SignalException

        group = agent.get_worker_group()
        code = one_code(failure.exitcode for failure in failures.values())
        if self.asked.number is None and self.elastic and code == EXIT_AGAIN:
            agent._remaining_restarts += 1  # another machine leaves or comes: they have saved, and meet again
            return
        if self.asked.number is not None or code in _FINAL:
            agent._remaining_restarts = 0
        more = None
        if self.tries is not None and agent._remaining_restarts:
            more = self.tries.again()
            agent._remaining_restarts = group.spec.max_restarts if more else 0
        self._say(group, failures, more or "")
        if self.tries is not None and self.tries.count > self.tries.limit:
            say(self.tries.summary)
        if self.elastic and code == EXIT_AGAIN:
            # In this way out the agent does not close the meeting point to the others.
            raise SignalException("this machine leaves", signal.SIGTERM)

    def _say(self, group: Any, failures: dict[int, Any], more: str) -> None:
        if self.board is None:
            return
        here = {worker.local_rank: worker.global_rank for worker in group.workers}
        positions = {here[rank]: position for rank, position in self.board.positions.items()}
        ended = [Ended(rank, failure.pid, failure.exitcode) for rank, failure in failures.items()]
        # torchrun has ended the others with SIGTERM.
        ended = [end for end in ended if end.code != -signal.SIGTERM] or ended
        folder = self.config.train.output_dir if self.config is not None else None
        several = group.group_world_size > 1
        messages, alone, host = self.board.messages, len(here) == 1 and not several, socket.gethostname() * several
        end = verdict(ended, messages, positions, folder, alone, self.oom_kills, host)
        if folder is not None and group.group_rank == 0:  # once, whatever the number of machines
            note(end, folder)
        if end.code != EXIT_CONFIG or messages:  # it has been said before anybody listened
            say_end(end, more)


def _set_to_watch(watch: Watch) -> None:
    """From here on the agents of this process are watched."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.rendezvous import RendezvousGracefulExitError
    from torch.distributed.launcher import api

    class Watched(LocalElasticAgent):
        def run(self, role: str = "default") -> RunResult:
            result = super().run(role)
            if result is None:  # one machine too many: it has waited until the end
                raise RendezvousGracefulExitError
            return result

        def _restart_workers(self, worker_group: WorkerGroup) -> None:
            watch.looked = None
            super()._restart_workers(worker_group)

        def _initialize_workers(self, worker_group: WorkerGroup) -> None:
            watch.begin(self)
            super()._initialize_workers(worker_group)

        def _stop_workers(self, worker_group: WorkerGroup) -> None:
            # torch's own way gives ranks 30 s to save before machines meet anew, whatever they have been promised.
            self._shutdown(timeout=self._shutdown_timeout)

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)
            watch.looked = time.monotonic() if result.state == WorkerState.HEALTHY else None
            if result.is_failed():
                watch.failed(self, result.failures)
            return result

    api.LocalElasticAgent = Watched  # type: ignore[misc]


def _config(options: Any) -> Config | None:
    """What `-m moe_dist train CONFIG ...` at the end of the command line will train; None when it is something else."""
    words = options.training_script_args
    if options.training_script not in ("moe_dist", "launcher") or len(words) < 2 or words[0] != "train":
        return None
    try:
        return load_config(words[1], words[2:])
    except ConfigError:
        return None  # the ranks say what is wrong with it
