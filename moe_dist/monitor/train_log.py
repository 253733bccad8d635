"""The text log: `train.log` of rank 0, `logs/rank-N.log` of the others, warnings of rank 0 on stderr."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

NAME = "moe_dist"
_OURS = "_moe_dist_train_log"


class _OneLine(logging.Formatter):
    """`moe-dist: warning: what happened`, on one line; the traceback is in the file, here only to debug."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"moe-dist: {record.levelname.lower()}: {' '.join(record.getMessage().split())}"
        if record.exc_info and os.environ.get("MOE_DIST_DEBUG") == "1":
            line += "\n" + self.formatException(record.exc_info)
        return line


class _CurrentStderr(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is now: the live console and pytest replace it while they run."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def log_path(output_dir: Path | str, rank: int) -> Path:
    """Where a rank writes its log."""
    folder = Path(output_dir)
    return folder / "train.log" if rank == 0 else folder / "logs" / f"rank-{rank}.log"


def setup_logging(output_dir: Path | str, rank: int) -> logging.Logger:
    """The logger `moe_dist` of this process: INFO and above appended to the rank's file, which is created.

    A second call moves the log to the new place. A file that cannot be written is one warning, not an error.
    Messages do not go on to the root logger, which other libraries may have pointed at the terminal;
    `close_logging` undoes everything.
    """
    close_logging()
    logger = logging.getLogger(NAME)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if rank == 0:
        stderr = _CurrentStderr()
        stderr.setLevel(logging.WARNING)
        stderr.setFormatter(_OneLine())
        _add(logger, stderr)
    path = log_path(output_dir, rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, mode="a", encoding="utf-8", errors="replace")
    except OSError as error:
        logger.warning("no log file: %s", error)
        return logger
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _add(logger, file)
    return logger


def close_logging() -> None:
    """Close the files and leave the logger `moe_dist` as Python made it."""
    logger = logging.getLogger(NAME)
    for handler in [handler for handler in logger.handlers if getattr(handler, _OURS, False)]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def _add(logger: logging.Logger, handler: logging.Handler) -> None:
    setattr(handler, _OURS, True)
    logger.addHandler(handler)
