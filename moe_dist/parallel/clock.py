"""How long communication takes and how much is sent, without stopping the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from moe_dist.parallel.status import Status


class Traffic(NamedTuple):
    """What expert parallelism has moved on one rank."""

    sent_bytes: int
    """To other ranks, by all-to-all, in both directions of a step."""
    received_rows: int
    """Rows, (token, expert) pairs, that came for this rank's experts, from itself and from others."""
    rows_to: tuple[int, ...]
    """Rows sent to each rank of the expert-parallel group, itself included; empty before there are any."""


class Clock:
    """Adds up the seconds spent inside `measure` blocks since the last `take`.

    On CPU the wall clock; on CUDA pairs of events, read only in `take`. Waiting for slower peers counts. Sizes are
    those the dispatcher has on the host anyway.
    """

    def __init__(self, device: torch.device, status: Status | None = None) -> None:
        self.status = status or Status()
        self.cuda = device.type == "cuda"
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._bytes, self._rows, self._stopped = 0, 0, False
        self._rows_to: list[int] = []

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens here is no training: neither seconds nor sizes count."""
        before, self._stopped = self._stopped, True
        try:
            yield
        finally:
            self._stopped = before

    def count(self, sent_bytes: int = 0) -> None:
        """Something has been sent to other ranks."""
        if not self._stopped:
            self._bytes += sent_bytes

    def count_rows(self, sent: list[int], received: int) -> None:
        """Rows have gone to each rank of the group, and have come for this rank's experts."""
        if not self._stopped:
            self._rows += received
            self._rows_to = [a + b for a, b in zip(self._rows_to or [0] * len(sent), sent, strict=True)]

    def take_traffic(self) -> Traffic:
        """What has been counted since the last call."""
        taken = Traffic(self._bytes, self._rows, tuple(self._rows_to))
        self._bytes, self._rows, self._rows_to = 0, 0, []
        return taken

    @contextmanager
    def measure(self, layer: int | None = None) -> Iterator[None]:
        """`layer`: the layer whose all-to-all it is."""
        before = self.status.inside("the all-to-all", layer)
        if self._stopped:
            yield
        elif self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - started
        self.status.back(before)

    def take(self) -> float:
        """Seconds since the last call."""
        seconds = self.seconds
        if self.events:
            self.events[-1][1].synchronize()
            seconds += sum(start.elapsed_time(end) for start, end in self.events) / 1000.0
        self.seconds, self.events = 0.0, []
        return seconds
