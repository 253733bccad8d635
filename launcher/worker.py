"""What each rank runs, however it was started."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from launcher.environment import Environment, detect
from moe_dist.config import Config
from moe_dist.config_loading import ConfigError, load_config

EXIT_CONFIG = 2
"""The configuration, the data or a checkpoint cannot be used as they are; nothing was changed."""
EXIT_STOPPED = 3
"""Training stopped itself: not finite, or diverged."""
EXIT_FAILED = 1
"""Anything unexpected."""
_PR_SET_PDEATHSIG = 1


def train(config: Config, environment: Environment, dataset: Any = None) -> int:
    """Train on this rank; returns the exit code."""
    from launcher.process_groups import connected  # torch, only once there is work to do
    from moe_dist.train.trainer import MoETrainer

    with connected(config, environment) as mesh:
        result = MoETrainer(config, mesh=mesh).train(dataset)
    return EXIT_STOPPED if result.failed else 0


def main(config: Config, environment: Environment) -> int:
    """`train`, with every error as one line: exit codes as above."""
    try:
        return train(config, environment)
    except ConfigError as error:
        return _report(error, environment, EXIT_CONFIG, str(error))
    except ValueError as error:
        if _is_ours(error):
            return _report(error, environment, EXIT_CONFIG, " ".join(str(error).split()))
        return _report(error, environment, EXIT_FAILED)
    except Exception as error:
        return _report(error, environment, EXIT_FAILED)


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error: then it is written for people."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return any(part in ("moe_dist", "launcher") for part in Path(last.filename).parts)


def _report(error: BaseException, environment: Environment, code: int, text: str | None = None) -> int:
    """One line for people; the traceback goes to the rank's log file."""
    logger = logging.getLogger("moe_dist")
    unexpected = text is None
    text = text or f"{type(error).__name__}: {' '.join(str(error).split())}"
    where = f"rank {environment.rank}: " if environment.is_distributed and unexpected else ""
    details = "".join(traceback.format_exception(error))
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(logger.makeRecord("moe_dist", logging.ERROR, "", 0, details, (), None))
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:  # the launcher reads it and prints the first one
        message = {"message": {"message": f"{where}{text}", "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(error_file).write_text(json.dumps(message))
    else:
        print(f"moe-dist: error: {where}{text}", file=sys.stderr, flush=True)
        if unexpected and os.environ.get("MOE_DIST_DEBUG") == "1":
            print(details, file=sys.stderr, flush=True)
    return code


def die_with_parent() -> None:
    """No orphans: the kernel ends this process when the launcher is gone (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the kernel knew
        os._exit(EXIT_FAILED)


def run_rank(config_file: str) -> None:
    """Entry of a rank started by the local launcher; never returns."""
    die_with_parent()
    # Ctrl-C reaches the whole terminal group: ranks go silently, the launcher has the word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    environment = detect()
    code = main(load_config(config_file, notice=lambda text: None), environment)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of collectives whose peers are gone must not hold up the end.
    os._exit(code)


if __name__ == "__main__":
    run_rank(sys.argv[1])
