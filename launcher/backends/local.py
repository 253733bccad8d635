"""`moe-dist train` on this machine: start the ranks, watch them, start again after a loss, say what happened.

The launcher is a parent and nothing else, so that it can always answer: a rank may sit in a collective for
minutes, the launcher never does. It opens the port of the rendezvous itself and hands it to rank 0 already
open: nobody can take it in between, a taken one is found at once, and only this machine can connect.
Imports no torch.
"""

from __future__ import annotations

import signal
import time

from launcher.connect.environment import JOB, named_job
from launcher.connect.exit_codes import EXIT_AGAIN, EXIT_FAILED, EXIT_STOPPED
from launcher.connect.rank_job import Proof
from launcher.supervise.exit_status import (
    End,
    Ended,
    Tries,
    newest_step,
    note,
    restore_terminal,
    say,
    say_end,
    verdict,
)
from launcher.supervise.forkserver import ForkServer
from launcher.supervise.hang import HangDiagnosis, diagnose_hang
from launcher.supervise.processes import GRACE, PATIENCE, POLL, Ranks, RankStarter, Signals
from moe_dist.config import Config
from moe_dist.monitor.train_log import log_path
from moe_dist.plan.smaller_batches import batches, halved

GAP = 2.0
"""Seconds between two looks that mean that this process was stopped, by Ctrl-Z for example, and its ranks with it."""


def launch(config: Config, proof: Proof | None = None) -> int:
    """Start `launch.nproc_per_node` ranks, wait for all of them, return the exit code.

    They train, or with `proof` they verify. When one fails the others are ended, and one line says which, how and
    where its log is. A run that saves is then started again from its newest checkpoint, until
    `launch.max_restarts` starts in a row have not got any further. With `train.auto_find_batch_size` any run that
    lacked memory in a step is, with smaller micro-batches, as long as there are smaller ones.
    """
    with Signals(last_words=proof is None) as signals, RankStarter(config, proof) as starter:
        job = named_job()
        tries = Tries(config, config.launch.max_restarts, job[JOB])
        while True:
            end = _run(config, proof, signals, job, starter.server)
            if proof is None:
                note(end, config.train.output_dir)
            if proof is None and not signals.first and (smaller := _smaller(end, config)) is not None:
                say_end(end, f"; starting again {tries.resuming(newest_step(config))} with {batches(smaller, config)}")
                config = smaller
                continue
            saves = proof is None and config.checkpoint.save_steps > 0
            if end.code != EXIT_FAILED or signals.first or not saves or not config.launch.max_restarts:
                say_end(end)
                return end.code
            more = tries.again()
            say_end(end, more or "")
            if more is None:
                say(tries.summary)
                return end.code


def _smaller(end: End, config: Config) -> Config | None:
    """The run with smaller micro-batches, where it has failed for want of memory and asks for that."""
    return halved(config) if end.lacks_memory and config.train.auto_find_batch_size else None


def _run(config: Config, proof: Proof | None, signals: Signals, job: dict[str, str], server: ForkServer | None) -> End:
    with Ranks(config, proof, job, server) as ranks:
        ended: list[Ended] = []
        deadline = None
        went_on = now = time.monotonic()
        while ranks.running and not signals.first:
            ended += ranks.poll()
            if deadline is None and any(end.code for end in ended):
                deadline = time.monotonic() + GRACE
            if deadline is not None and time.monotonic() > deadline:
                break
            still = _standing_still(ranks, config, time.monotonic() - went_on)
            before, now = now, time.monotonic()
            if now - before > GAP:
                went_on = now
            elif deadline is None and still is not None:
                return _hung(still, ranks, config)
            time.sleep(POLL)
        # Whoever failed in this very moment is still a cause, not a casualty.
        ended += ranks.poll()
        if signals.first:
            ranks.ask_to_stop(signals, config.launch.grace_period)
            ranks.end()
            return _interrupted(signals.first, ranks)
        ranks.ask_to_stop(signals, PATIENCE)
        ranks.end()
        failed = [end for end in ended if end.code]
        folder, alone = config.train.output_dir, len(ranks.processes) == 1
        return verdict(failed, ranks.messages, ranks.positions, folder, alone, ranks.oom_kills)


def _standing_still(ranks: Ranks, config: Config, longest: float) -> HangDiagnosis | None:
    """Whom all ranks wait for, when in the last `longest` seconds none has moved for `monitor.stall_timeout`."""
    seen = {
        rank: one._replace(position=one.position._replace(seconds=min(one.position.seconds, longest)))
        for rank, one in ranks.seen.items()
    }
    if len(seen) < len(ranks.processes):
        return None
    return diagnose_hang(
        seen, config.monitor.stall_timeout, lambda rank: f"rank {rank} (pid {ranks.processes[rank].pid})"
    )


def _hung(still: HangDiagnosis, ranks: Ranks, config: Config) -> End:
    """Say whom the others wait for, and have every rank write down its Python stack."""
    restore_terminal()
    ranks.end_with_stacks()
    line = f"error: {still.text}; the other ranks were stopped"
    return End(EXIT_FAILED, line, str(log_path(config.train.output_dir, still.ranks[0])))


def _interrupted(number: int, ranks: Ranks) -> End:
    """Say what has come of it. All ranks that were training end alike: on request, saved."""
    restore_terminal()
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    codes = {process.returncode for process in ranks.processes}
    said = ranks.messages.get(0, "")
    if codes == {EXIT_AGAIN}:
        _, _, after = said.partition(" after ")
        line = f"stopped by {name} after {after}" if after else f"stopped by {name}"
        return End(128 + number if number == signal.SIGINT else EXIT_AGAIN, line)
    if codes == {EXIT_STOPPED}:
        return End(EXIT_STOPPED)  # rank 0 has said why
    if codes == {0}:
        return End(0)  # it was at its end anyway
    return End(128 + number, f"stopped by {name}; every process has ended")
