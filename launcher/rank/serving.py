"""What ranks do for `moe-dist serve`: rank 0 hears clients, the others compute with it."""

from __future__ import annotations

import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.connect.environment import Environment, outside_of_ranks
from launcher.connect.exit_codes import EXIT_CTRL_C
from launcher.connect.rank_job import LAUNCHER, Inference
from launcher.rank.opening import opened
from moe_dist.config import Config, ConfigError

if TYPE_CHECKING:
    from moe_dist.serve.audit import AuditLog
    from moe_dist.serve.training import TrainingQueue


def serve(config: Config, environment: Environment, wanted: Inference) -> int:
    """Open the model on all ranks and serve it until a signal; returns the exit code."""
    options = wanted.options
    listener = None
    if environment.rank == 0:
        from moe_dist.serve.server import listen

        try:
            listener = listen(options["host"], options["port"])
        except ValueError as error:
            raise ConfigError(str(error)) from error
    else:  # rank 0 says when
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    from launcher.connect.process_groups import connected
    from moe_dist.generate.engine import MoEInferenceEngine

    with connected(config, environment) as mesh:
        model, tokenizer = opened(config, mesh, wanted)
        engine = MoEInferenceEngine(model, tokenizer, mesh=mesh, **options["engine"])
        if listener is None:
            from moe_dist.serve.engine_thread import step_for_ever

            step_for_ever(engine, lambda is_busy: [], lambda news: None)
            return 0
        return _serve(engine, listener, options)


def _serve(engine: Any, listener: Any, options: dict[str, Any]) -> int:
    from moe_dist.serve.app import Service
    from moe_dist.serve.audit import AuditLog
    from moe_dist.serve.engine_thread import EngineThread
    from moe_dist.serve.gate import Limits
    from moe_dist.serve.keys import KeyRing
    from moe_dist.serve.server import run

    audit: AuditLog | None = None
    try:
        keys = KeyRing(Path(options["keys"])) if options["keys"] else None
        if options["audit"]:
            audit = AuditLog(Path(options["audit"]), **options["audit_options"])
        trainings = _trainings(options["train"], audit) if options["train"] else None
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    thread = EngineThread(engine, options["max_waiting"])
    parts: dict[str, Any] = {"keys": keys, "audit": audit, "trainings": trainings}
    service = Service(thread, options["name"], limits=Limits(**options["limits"]), **parts)
    tls = (Path(options["tls"][0]), Path(options["tls"][1])) if options["tls"] else None
    host, port = listener.getsockname()[:2]
    scheme, host = "http" if tls is None else "https", f"[{host}]" if ":" in host else host
    where = f"{scheme}://{host}:{port}"
    known = "no keys" if keys is None else f"keys: {len(keys.clients)}"
    line = f"moe-dist: {options['name']} at {where}/v1 ({known}; {where}/docs)"
    try:
        number = run(
            service,
            listener,
            ready=lambda: print(line, file=sys.stderr, flush=True),
            tls=tls,
            drain_seconds=options["drain_seconds"],
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    finally:
        if audit is not None:
            audit.close()
    return EXIT_CTRL_C if number == signal.SIGINT else 0


def _trainings(wanted: dict[str, Any], audit: AuditLog | None) -> TrainingQueue:
    """Raises OSError."""
    from moe_dist.serve.training import TrainingQueue

    environment = outside_of_ranks() | {LAUNCHER: str(os.getpid())}
    if not wanted["own_code"]:
        environment["PYTHONSAFEPATH"] = "1"  # a file in the folder must not be imported for a module of its name

    def tell(line: dict[str, Any]) -> None:
        if audit is not None:
            audit.write({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line}, {})

    folder, own_code = Path(wanted["folder"]), wanted["own_code"]
    return TrainingQueue(folder, wanted["command"], environment, own_code=own_code, tell=tell)
