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


class _RankLog(logging.FileHandler):
    """A rank's log file. Lines are kept in memory until `begin`; those that a full disk does not take are counted."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="replace", delay=True)
        self._held: list[str] | None = []
        self._descriptor: int | None = None
        self._lost = 0

    @property
    def has_begun(self) -> bool:
        return self._held is None

    def begin(self) -> None:
        """Write what has been held, and everything from now on at once."""
        held, self._held = self._held or [], None
        self._write("".join(f"{line}\n" for line in held))

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if self._held is not None:
            self._held.append(line)
        else:
            self._write(f"{line}\n")

    def _write(self, text: str) -> None:
        before = f"\n{self._lost} times nothing could be written here\n" if self._lost else ""
        try:
            if self._descriptor is None:
                Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(
                    self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
                )
            content = memoryview(f"{before}{text}".encode(errors="replace"))
            while content:
                content = content[os.write(self._descriptor, content) :]
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                near = os.path.relpath(self.baseFilename)
                logging.getLogger(NAME).warning("no log file: %s: %s; training goes on", near, error.strerror)
            return
        self._lost = 0

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        super().close()


def setup_logging(output_dir: Path | str, rank: int) -> logging.Logger:
    """The logger `moe_dist` of this process: INFO and above are for the rank's file, which `open_log` makes.

    A second call moves the log to the new folder. A file that cannot be written is one warning, not an error.
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
    file = _RankLog(log_path(output_dir, rank))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _add(logger, file)
    return logger


def open_log() -> None:
    """Write the file from now on, with what has been logged so far: the run folder is this run's."""
    for handler in _files():
        handler.begin()


def write_to_log(text: str, open_it: bool) -> str | None:
    """Append to the log file; returns its path. `open_it`: also when `open_log` has not been called, None otherwise."""
    for handler in _files():
        if open_it:
            handler.begin()
        if handler.has_begun:
            handler.handle(logging.getLogger(NAME).makeRecord(NAME, logging.ERROR, "", 0, text, (), None))
            near = os.path.relpath(handler.baseFilename)
            return handler.baseFilename if near.startswith("..") else near
    return None


def _files() -> list[_RankLog]:
    return [handler for handler in logging.getLogger(NAME).handlers if isinstance(handler, _RankLog)]


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
