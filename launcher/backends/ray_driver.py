"""Training by Ray Train: ask for the workers, wait for the end, say what happened. Imports Ray, but no torch itself."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from launcher.backends.ray import DEFAULTS, RESIZE_INTERVAL, Plan
from launcher.backends.ray_rank import BEFORE_TRAINING, LEAVING, TICK, Mailbox, RankFailed, run
from launcher.connect.environment import JOB
from launcher.connect.exit_codes import EXIT_AGAIN, EXIT_FAILED
from launcher.connect.output import mute
from launcher.rank.worker import leave
from launcher.supervise.processes import HEARING, Signals, say
from moe_dist.config import ConfigError

os.environ.update({name: value for name, value in DEFAULTS.items() if name not in os.environ})  # read at import
try:
    import ray
    import ray.train
    from ray.train.backend import Backend, BackendConfig
    from ray.train.torch import TorchTrainer
except ImportError as error:
    raise ConfigError(f"Ray cannot be used ({error}); pip install 'moe-dist[ray]'") from error

PRINTING = 0.2
"""Seconds between two looks at what the ranks have printed."""
SILENCE = 60.0
"""Seconds without a worker after which the command says what Ray waits for."""


class _SharedDevices(Backend):
    """Nothing is set up by Ray but this: every worker sees all GPUs of its node that the run has."""

    share_cuda_visible_devices = True


class _NoBackend(BackendConfig):
    """The ranks connect themselves."""

    backend = "none"

    @property
    def backend_cls(self) -> type[Backend]:
        return _SharedDevices


class _Tells(ray.train.UserCallback):
    """One line about each failure, from Ray's controller."""

    def __init__(self, mailbox: Any, max_failures: int) -> None:
        self._mailbox, self._left, self._max = mailbox, max_failures, max_failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if self._left > 0:  # the last one is said by the command
            self._left -= 1
            text = (
                f"moe-dist: error: {cause(worker_exceptions)}; Ray starts the workers again "
                f"(failure {self._max - self._left} of {self._max})\n"
            )
            self._mailbox.say.remote(2, text.encode())


def connect(address: str | None, cpus: float, **options: Any) -> None:
    """Join the cluster, or start one on this machine with so many CPUs at least. Raises ConfigError."""
    options |= {"logging_level": "error", "log_to_driver": False}
    host, _, port = (address or "").rpartition(":")
    if port.isdecimal():
        try:  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConfigError(f"--address {address}: no Ray there ({error})") from error
    try:
        if address != "local":
            with suppress(ConnectionError):
                ray.init(address=address or "auto", **options)
                return
            if address is not None:
                raise ConfigError(f"--address {address}: there is no Ray cluster; start one with ray start --head")
        options |= {"num_cpus": max(os.cpu_count() or 1, math.ceil(cpus)), "include_dashboard": False}
        try:
            ray.init(address="local", **options)
        except Exception as error:
            # Ray gives its own processes 30 s, which a busy machine may need for reading them from its disk.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            ray.init(address="local", **options)
    except ConfigError:
        raise
    except Exception as error:  # some are just that
        raise ConfigError(f"Ray cannot be reached or started: {' '.join(str(error).split())[:500]}") from error


def abandon(code: int) -> NoReturn:
    """End this process while another thread waits for Ray: a cluster of ours ends first, another ends our workers.

    `ray.shutdown` would do, but for the other thread, in which Ray then ends the process with a code of its own.
    """
    logging.disable(logging.CRITICAL)  # what that thread thinks of it
    with suppress(Exception):
        ray._private.worker._global_node.kill_all_processes(check_alive=False, allow_graceful=True)
    leave(code)


def launch(plan: Plan) -> int:
    """Train by Ray; returns the exit code of `moe-dist launch ray`."""
    connect(plan.address, plan.resources["CPU"] * plan.worlds[-1])
    with Signals() as signals:  # after Ray, which takes SIGTERM to itself
        if (lacking := _room(plan)) is not None:
            say(f"{lacking} (Ctrl-C ends it)")
        try:
            # The mailbox is where this command runs, so that no other node's end takes it away.
            here = ray.get_runtime_context().get_node_id()
            mailbox = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": here})(Mailbox).remote()
            while True:
                code, line = _fit(plan, mailbox, signals)
                if code not in (EXIT_AGAIN, *BEFORE_TRAINING) or not ray.get(mailbox.goes_on.remote()):
                    break
                say("a node is being taken away; the last step is saved, and the run goes on from it elsewhere")
        finally:
            _clear(plan)
            ray.shutdown()
        if line is not None:
            say(line)
        return code


def _clear(plan: Plan) -> None:
    """Remove Ray's own notes."""
    shutil.rmtree(plan.storage_path / plan.name, ignore_errors=True)
    with suppress(OSError):
        plan.storage_path.rmdir()


def _fit(plan: Plan, mailbox: Any, signals: Signals) -> tuple[int, str | None]:
    """One `TorchTrainer.fit`: exit code, and the line that says it (None: it has been said)."""
    job = {
        "config": plan.config.model_dump_json(),
        "worlds": plan.worlds,
        "batch": plan.batch,
        "environment": {JOB: os.environ.get(JOB) or plan.token, **plan.environment},
        "folder": str(Path.cwd()),
        "mailbox": mailbox,
    }
    resize = {"elastic_resize_monitor_interval_s": RESIZE_INTERVAL} if plan.elastic else {}
    trainer = TorchTrainer(
        run,
        train_loop_config=job,
        torch_config=_NoBackend(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.num_workers, use_gpu=plan.use_gpu, resources_per_worker=plan.resources, **resize
        ),
        run_config=ray.train.RunConfig(
            name=plan.name,
            storage_path=str(plan.storage_path),
            failure_config=ray.train.FailureConfig(max_failures=plan.max_failures),
            callbacks=[_Tells(mailbox, plan.max_failures)],
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    raised: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            raised.append(error)

    # Not in the main thread: there Ray would take Ctrl-C to itself.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    if not _watch(thread, mailbox, signals, plan):
        _clear(plan)
        number = signals.first or signal.SIGTERM
        say(f"stopped by {_name(number)}; every process has ended")
        abandon(128 + number)
    outcome = ray.get(mailbox.outcome.remote())
    if outcome is not None:
        return _ended(outcome, signals)
    if raised:
        failures = getattr(raised[0], "worker_failures", None)
        text = cause(failures) if failures else _one_line(raised[0])
        tries = f" (after {plan.max_failures} failures before it)" if plan.max_failures else ""
        return EXIT_FAILED, f"error: {text}{tries}"
    return 0, None


def _watch(thread: threading.Thread, mailbox: Any, signals: Signals, plan: Plan) -> bool:
    """Wait for the end, print what the ranks print, and pass on what the command is asked.

    False when the end must not be waited for.
    """
    asked_at: float | None = None
    silent = False
    while True:
        ended = not thread.is_alive()
        said, seconds = ray.get(mailbox.news.remote())
        _print(said)
        if ended:
            return True
        if seconds > SILENCE and not silent:
            say(f"no worker for {seconds:.0f} s; {_room(plan) or 'they are being started'} (Ctrl-C ends it)")
        silent = seconds > SILENCE
        if signals.first and asked_at is None:
            asked_at = time.monotonic()
            ray.get(mailbox.ask_to_stop.remote(signals.first))
        if asked_at is not None:
            waited, grace = time.monotonic() - asked_at, plan.config.launch.grace_period
            hearing = HEARING + 2 * TICK if signals.first == signal.SIGINT else grace
            unheard = waited > hearing and not ray.get(mailbox.heard.remote())
            if signals.insisted or waited > grace + LEAVING or unheard:
                return False
        thread.join(PRINTING)


def _print(said: list[tuple[int, bytes]]) -> None:
    for stream, text in said:
        file = sys.stderr if stream == 2 else sys.stdout
        try:
            file.write(text.decode(errors="replace"))
            file.flush()
        except BrokenPipeError:  # training goes on
            mute(stream)


def _room(plan: Plan) -> str | None:
    """What the cluster lacks for the fewest workers; None when nothing."""
    there, fewest = ray.cluster_resources(), plan.worlds[0]
    for name, each in plan.resources.items():
        if there.get(name, 0) < each * fewest:
            return (
                f"{fewest} workers with {each:g} {name} each need {each * fewest:g}, and the cluster has "
                f"{there.get(name, 0):g}: waiting for more"
            )
    return None


def _ended(outcome: tuple[int, str | None], signals: Signals) -> tuple[int, str | None]:
    """A run that has been stopped, or cannot go on."""
    code, text = outcome
    if code in BEFORE_TRAINING:
        number = signals.first or code - 128
        return 128 + number, f"stopped by {_name(number)}; every process has ended"
    if code in (EXIT_AGAIN, 128 + signal.SIGINT):
        _, _, after = (text or "").partition(" after ")
        name = f" by {_name(signals.first)}" if signals.first else ""
        if signals.first == signal.SIGINT:
            code = 128 + signal.SIGINT
        return code, f"stopped{name} after {after}" if after else f"stopped{name}"
    return code, f"error: {text}" if text else None


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def cause(failures: dict[int, Exception]) -> str:
    """What went wrong first. A rank or worker ended from outside is the cause, whatever its peers said before."""
    ours = [error for error in failures.values() if isinstance(error, RankFailed)]
    for error in ours:
        if error.cause:
            return error.text
    for number, other in failures.items():
        if not isinstance(other, RankFailed):
            return f"the worker of rank {number} is lost: {_one_line(other)}"
    return ours[0].text


def _one_line(error: Exception) -> str:
    """Ray's errors are pages; their last line says it."""
    inner = getattr(error, "health_check_failure", None) or getattr(error, "controller_failure", None) or error
    if isinstance(inner, ray.exceptions.RayActorError):
        return "its process or its node has died"
    return " ".join(str(inner).split())[:300]
