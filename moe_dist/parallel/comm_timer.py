"""How long communication takes and how much is sent, without stopping the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch.distributed import ProcessGroup

from moe_dist.parallel.flight import Trace
from moe_dist.parallel.status import Status

Way = Literal["dispatch", "combine"]
"""Rows to their experts, and their gradients back; or rows home, and their gradients back."""


class Traffic(NamedTuple):
    """What expert parallelism has moved on one rank."""

    bytes_to: tuple[int, ...]
    """Bytes sent by all-to-all, in both directions of a step, to each rank of the expert-parallel group, 0 to itself;
    empty before there are any."""
    received_rows: int
    """Rows, (token, expert) pairs, that came for this rank's experts, from itself and from others."""
    rows_to: tuple[int, ...]
    """Rows sent to each rank of the expert-parallel group, itself included; empty before there are any."""

    @property
    def sent_bytes(self) -> int:
        """To all other ranks."""
        return sum(self.bytes_to)


class Clock:
    """Adds up the seconds spent inside `measure` blocks since the last `take`.

    On CPU the wall clock; on CUDA pairs of events, read only in `take`. Waiting for slower peers counts. Sizes are
    those the dispatcher has on the host anyway.
    """

    def __init__(self, device: torch.device, status: Status | None = None) -> None:
        self.status = status or Status()
        self.cuda = device.type == "cuda"
        self.seconds: dict[Way, float] = {"dispatch": 0.0, "combine": 0.0}
        self.events: list[tuple[Way, torch.cuda.Event, torch.cuda.Event]] = []
        self._rows, self._stopped = 0, False
        self._rows_to: list[int] = []
        self._bytes_to: list[int] = []
        self._members: dict[str, tuple[Sequence[int], int]] = {}
        self.trace: Trace | None = None
        """Of what is hidden behind computing, while somebody looks."""

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens here is no training: neither seconds nor sizes count."""
        before, self._stopped = self._stopped, True
        try:
            yield
        finally:
            self._stopped = before

    def name(self, part: ProcessGroup, members: Sequence[int], size: int) -> None:
        """Those of `part` are these of the `size` ranks of the expert-parallel group."""
        self._members[part.group_name] = (tuple(members), size)

    def count(self, rows: Sequence[int], row_bytes: int, group: ProcessGroup) -> None:
        """Rows of so many bytes have been sent to each rank of the group, or of a named part of it."""
        if self._stopped:
            return
        members, size = self._members.get(group.group_name, (range(len(rows)), len(rows)))
        self._bytes_to = self._bytes_to or [0] * size
        for member, number in zip(members, rows, strict=True):
            self._bytes_to[member] += number * row_bytes
        self._bytes_to[members[group.rank()]] = 0

    def count_rows(self, sent: list[int], received: int) -> None:
        """Rows have gone to each rank of the group, and have come for this rank's experts."""
        if not self._stopped:
            self._rows += received
            self._rows_to = [a + b for a, b in zip(self._rows_to or [0] * len(sent), sent, strict=True)]

    def take_traffic(self) -> Traffic:
        """What has been counted since the last call."""
        taken = Traffic(tuple(self._bytes_to), self._rows, tuple(self._rows_to))
        self._bytes_to, self._rows, self._rows_to = [], 0, []
        return taken

    @contextmanager
    def measure(self, layer: int | None = None, way: Way = "dispatch") -> Iterator[None]:
        """`layer` and `way`: the layer whose all-to-all it is, and which of the two."""
        before = self.status.inside("the all-to-all", layer)
        if self._stopped:
            yield
        elif self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.events.append((way, start, end))
        else:
            started = time.perf_counter()
            with nullcontext() if self.trace is None else self.trace.waiting(layer, way):
                yield
            self.seconds[way] += time.perf_counter() - started
        self.status.back(before)

    def take(self) -> dict[Way, float]:
        """Seconds since the last call."""
        seconds = self.seconds
        if self.events:
            self.events[-1][2].synchronize()
        for way, start, end in self.events:
            seconds[way] += start.elapsed_time(end) / 1000.0
        self.seconds, self.events = {"dispatch": 0.0, "combine": 0.0}, []
        return seconds
