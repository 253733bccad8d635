"""A process that imports what every rank needs and then forks ranks, as `launcher.supervise.forkserver` asks."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import json
import os
import socket
import time
from contextlib import suppress
from typing import NoReturn

from launcher.connect.rank_job import FORKED, LAUNCHER, PRELOADED
from launcher.rank.worker import die_with_parent, run_rank

IMPORTED = ("torch", "launcher.connect.process_groups", "moe_dist.train.trainer")
"""More than a second of imports, of which none starts a thread, beside those in `PRELOADED`. One that fails does so
again in the rank, which can say so."""
_PR_SET_NAME = 15
_HIGH = 512
"""Files of the server's own, and those it is sent, have numbers from here, out of the way of those they are to have."""


def serve() -> NoReturn:
    """Until the launcher has gone, or has no further use for it."""
    launcher = int(os.environ[LAUNCHER])
    die_with_parent(launcher)
    number = int(os.environ.pop(FORKED))
    asked = socket.socket(fileno=fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _HIGH))
    os.close(number)
    for name in (*IMPORTED, *os.environ.pop(PRELOADED, "").split()):
        with suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is there stays where it is in every rank's memory, shared
    while True:
        message, files, _, _ = socket.recv_fds(asked, 1 << 20, 16)
        if not message:
            os._exit(0)
        start = json.loads(message)
        middle = os.fork()
        if not middle:
            _fork_a_rank(asked, start["environment"], dict(zip(files, start["files"], strict=True)), launcher)
        os.waitpid(middle, 0)
        for file in files:
            os.close(file)


def _fork_a_rank(asked: socket.socket, environment: dict[str, str], files: dict[int, int], launcher: int) -> NoReturn:
    """In between: fork, tell the launcher who it is, and be gone, so that the launcher adopts it."""
    middle, rank = os.getpid(), os.fork()
    if rank:
        asked.send(str(rank).encode())
        os._exit(0)
    asked.close()
    moved = {fcntl.fcntl(file, fcntl.F_DUPFD, _HIGH): number for file, number in files.items()}
    for file in files:
        os.close(file)
    for file, number in moved.items():
        os.dup2(file, number)
        os.close(file)
    while os.getppid() == middle:
        time.sleep(0.001)
    os.environ.clear()
    os.environ.update(environment)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"moe-rank-{environment['RANK']}".encode())
    run_rank()
