"""Run a function on several gloo ranks: `run_ranks(function, 4, argument)`.

Ranks are real processes with one process group, kept between calls so that a test costs milliseconds, not imports.
A rank that fails or does not answer in time ends the whole set, and the failure shows what every rank printed.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GROUP_TIMEOUT = 60.0
"""Seconds: on a busy machine a rank of `verify` computes alone for 20 before the others hear of it."""
PRELOADED = [
    *("torch._dynamo", "torch.distributed.device_mesh", "torch.distributed.pipelining"),
    *("moe_dist.parallel.engines.adafactor", "moe_dist.train.trainer", "moe_dist.verify.run"),
]
"""Imported once, in the process from which ranks are forked: seconds for each of them otherwise."""
MOST_THREADS = 150
"""Of a rank, with which it is still used: gloo has three for every group, and wakes one of them 100 times a second."""
_sets: dict[int, RankSet] = {}


class RankFailure(AssertionError):
    """Some rank raised, died or hung; the message holds every rank's log."""


class RankSet:
    """`world_size` processes connected by gloo on loopback."""

    def __init__(self, world_size: int) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.connections: list[Connection] = []
        self.processes = []
        store = self.folder / "store"  # a port would be anybody's between its choice and its use
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            log = self.folder / f"rank-{rank}.log"
            process = context.Process(
                target=_serve, args=(theirs, rank, world_size, str(store), str(log)), daemon=True, name=f"rank-{rank}"
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], arguments: tuple, timeout: float) -> list[Any]:
        for connection in self.connections:
            connection.send((function, arguments))
        deadline = time.monotonic() + timeout
        results, problems = {}, {}
        waiting = dict(enumerate(self.connections))
        while waiting:
            ready = wait(waiting.values(), max(0.0, deadline - time.monotonic()))
            if not ready:
                problems |= dict.fromkeys(waiting, "no answer")
                break
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                try:
                    ok, value = pickle.loads(waiting.pop(rank).recv_bytes())
                    (results if ok else problems)[rank] = value
                except (EOFError, ConnectionError):
                    self.processes[rank].join(1)
                    problems[rank] = f"died, exit code {self.processes[rank].exitcode}"
            if problems:  # the others get a moment to say what they saw, no more
                deadline = min(deadline, time.monotonic() + 2.0)
        if problems:
            lines = [f"rank {rank}: {problems[rank]}" for rank in sorted(problems)]
            raise RankFailure("\n".join(lines) + self.logs())
        return [results[rank] for rank in range(len(self.connections))]

    @property
    def num_threads(self) -> int:
        """Of its first rank."""
        tasks = Path(f"/proc/{self.processes[0].pid}/task")
        return len(list(tasks.iterdir())) if tasks.exists() else 0

    def logs(self) -> str:
        texts = [(path.name, path.read_text(errors="replace")) for path in sorted(self.folder.glob("*.log"))]
        return "".join(f"\n--- {name} ---\n{text[-4000:]}" for name, text in texts if text.strip())

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()  # what measures coverage writes it down now
        deadline = time.monotonic() + 3
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join(5)


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """`function(*arguments)` on every rank, at the same time; the results in order of rank.

    `function` must be importable (top level of a test module). Raises RankFailure.
    """
    if world_size in _sets and _sets[world_size].num_threads > MOST_THREADS:
        _sets.pop(world_size).stop()
    if world_size not in _sets:
        for other in list(_sets):  # idle ranks take memory, and time for those threads
            _sets.pop(other).stop()
        _sets[world_size] = RankSet(world_size)
    try:
        return _sets[world_size].call(function, arguments, timeout)
    except RankFailure:
        _sets.pop(world_size).stop()
        raise


@atexit.register
def stop_all() -> None:
    """End every rank that is left."""
    for ranks in _sets.values():
        ranks.stop()
    _sets.clear()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(connection: Connection, rank: int, world_size: int, store: str, log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=GROUP_TIMEOUT),
    )
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(_dumps(answer))


def _dumps(answer: Any) -> bytes:
    """Tensors as bytes: multiprocessing would open a file and two sockets for each."""
    import torch

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if type(value) is not torch.Tensor or value.device.type != "cpu" or value.layout is not torch.strided:
                return NotImplemented
            data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return _tensor, (data, value.dtype, value.shape)

    buffer = io.BytesIO()
    Pickler(buffer).dump(answer)
    return buffer.getvalue()


def _tensor(data: bytes, dtype: Any, shape: Any) -> Any:
    import torch

    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)
        if data
        else torch.empty(shape, dtype=dtype)
    )
