"""`moe-dist train` on this machine: start the ranks, watch them, start again after a loss, say what happened.

The launcher is a parent and nothing else, so that it can always answer: a rank may sit in a collective for
minutes, the launcher never does. It opens the port of the rendezvous itself and hands it to rank 0 already
open: nobody can take it in between, a taken one is found at once, and only this machine can connect.
Imports no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import NamedTuple

from launcher.processes import GRACE, PATIENCE, POLL, Ended, Ranks, Signals, say
from launcher.worker import EXIT_AGAIN, EXIT_CONFIG, EXIT_DIFFERS, EXIT_FAILED, EXIT_STOPPED, Proof
from moe_dist.checkpoint.manifest import CheckpointError
from moe_dist.checkpoint.storage import open_storage, step_folder
from moe_dist.config import Config
from moe_dist.monitor.train_log import log_path
from moe_dist.parallel.hang import Sighting, Verdict, judge

GAP = 2.0
"""Seconds between two looks that mean that this process was stopped, by Ctrl-Z for example, and its ranks with it."""


def launch(config: Config, proof: Proof | None = None) -> int:
    """Start `launch.nproc_per_node` ranks, wait for all of them, return the exit code.

    They train, or with `proof` they verify. When one fails the others are ended, and one line says which, how and
    where its log is. A run that saves is then started again from its newest checkpoint, until
    `launch.max_restarts` starts in a row have not got any further.
    """
    with Signals() as signals:
        tries, furthest = 0, newest_step(config)
        while True:
            end = _run(config, proof, signals)
            saves = proof is None and config.checkpoint.save_steps > 0
            if end.code != EXIT_FAILED or signals.first or not saves or not config.launch.max_restarts:
                _say_all(end)
                return end.code
            step = newest_step(config)
            tries, furthest = (1, step) if step > furthest else (tries + 1, furthest)
            if tries > config.launch.max_restarts:
                _say_all(end)
                where = f"step {furthest}" if furthest >= 0 else "a first checkpoint"
                say(f"error: {tries} starts in a row have ended like this without getting past {where}; giving up")
                return end.code
            place = f"from {step_folder(step)}" if step >= 0 else "at the beginning"
            _say_all(end, f"; starting again {place} (try {tries} of {config.launch.max_restarts})")
            config = config.model_copy(deep=True)
            if step >= 0 or config.checkpoint.resume == "never":
                config.checkpoint.resume = "auto"  # this run's own newest, not what the first start was told


def newest_step(config: Config) -> int:
    """The newest committed step of the run folder, -1 when there is none or nobody can say."""
    try:
        steps = open_storage(config.checkpoint.folder or config.train.output_dir).steps()
    except (OSError, CheckpointError):
        return -1
    return steps[-1] if steps else -1


class End(NamedTuple):
    """How one start of a run has ended, and the line that says it (None: it has been said)."""

    code: int
    line: str | None = None
    log: str | None = None


def _say_all(end: End, more: str = "") -> None:
    if end.line is not None:
        say(end.line + more + (f"; log: {end.log}" if end.log else ""))


def _run(config: Config, proof: Proof | None, signals: Signals) -> End:
    with Ranks(config, proof) as ranks:
        ended: list[Ended] = []
        deadline = None
        went_on = now = time.monotonic()
        while ranks.running and not signals.first:
            ended += ranks.poll()
            if deadline is None and any(end.code for end in ended):
                deadline = time.monotonic() + GRACE
            if deadline is not None and time.monotonic() > deadline:
                break
            verdict = _standing_still(ranks, config, time.monotonic() - went_on)
            before, now = now, time.monotonic()
            if now - before > GAP:
                went_on = now
            elif deadline is None and verdict is not None:
                return _hung(verdict, ranks, config)
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


def _standing_still(ranks: Ranks, config: Config, longest: float) -> Verdict | None:
    """Whom all ranks wait for, when in the last `longest` seconds none has moved for `monitor.stall_timeout`."""
    timeout = config.monitor.stall_timeout
    places = {rank: place._replace(seconds=min(place.seconds, longest)) for rank, place in ranks.places.items()}
    if (
        len(places) < len(ranks.processes)
        or judge({rank: Sighting(place) for rank, place in places.items()}, timeout) is None
    ):
        return None
    seen = {rank: Sighting(place, state="stopped" if ranks.is_stopped(rank) else "") for rank, place in places.items()}
    return judge(seen, timeout, lambda rank: f"rank {rank} (pid {ranks.processes[rank].pid})")


def _hung(verdict: Verdict, ranks: Ranks, config: Config) -> End:
    """Say whom the others wait for, and have every rank that can write down its Python stack."""
    _restore_terminal()
    ranks.write_stacks()
    ranks.end()
    line = f"error: {verdict.text}; the other ranks were stopped"
    return End(EXIT_FAILED, line, str(log_path(config.train.output_dir, verdict.ranks[0])))


def _interrupted(number: int, ranks: Ranks) -> End:
    """Say what has come of it. All ranks that were training end alike: on request, saved."""
    _restore_terminal()
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    codes = {process.returncode for process in ranks.processes}
    told = ranks.told.get(0, "")
    if codes == {EXIT_AGAIN}:
        _, _, after = told.partition(" after ")
        line = f"stopped by {name} after {after}" if after else f"stopped by {name}"
        return End(128 + number if number == signal.SIGINT else EXIT_AGAIN, line)
    if codes == {EXIT_STOPPED}:
        return End(EXIT_STOPPED)  # rank 0 has said why
    if codes == {0}:
        return End(0)  # it was at its end anyway
    return End(128 + number, f"stopped by {name}; every process has ended")


def _verdict(failed: list[Ended], ranks: Ranks, config: Config) -> End:
    """Say what went wrong first. A rank ended from outside is the cause, whatever its peers said before."""
    if not failed:
        return End(0)
    _restore_terminal()
    alone, told = config.launch.nproc_per_node == 1, ranks.told
    # Not SIGABRT: that is how libraries give up when a peer is gone.
    killed = [end for end in failed if end.code < 0 and end.code != -signal.SIGABRT]
    spoke = [end for rank in told for end in failed if end.rank == rank]
    cause = (killed or spoke or failed)[0]
    who = f"the process (pid {cause.pid})" if alone else f"rank {cause.rank} (pid {cause.pid})"
    others = "" if alone else "; the other ranks were stopped"
    log = str(log_path(config.train.output_dir, cause.rank))
    place = ranks.places.get(cause.rank)
    where = f" {place}" if place is not None and place.step else ""
    if cause.code == EXIT_AGAIN:
        return End(EXIT_AGAIN, told.get(0, "stopped on request"))
    if cause.code < 0:
        name = signal.Signals(-cause.code).name
        hint = ", by someone or for want of memory" if name == "SIGKILL" else ""
        return End(EXIT_FAILED, f"error: {who} was ended by {name}{where}{hint}{others}", log)
    code = cause.code if cause.code in (EXIT_CONFIG, EXIT_STOPPED, EXIT_DIFFERS) else EXIT_FAILED
    if cause.rank in told:
        return End(code, f"error: {told[cause.rank]}")
    if cause.code in (EXIT_STOPPED, EXIT_DIFFERS):
        return End(code)
    return End(code, f"error: {who} ended with exit code {cause.code}{where}{others}", log)


def _restore_terminal() -> None:
    """Rank 0 may have ended with its cursor hidden, in the middle of a line."""
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        print("\x1b[?25h", flush=True)
