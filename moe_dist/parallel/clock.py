"""How long communication takes, without stopping the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_dist.parallel.status import Status


class Clock:
    """Adds up the seconds spent inside `measure` blocks since the last `take`.

    On CPU the wall clock; on CUDA pairs of events, read only in `take`. Waiting for slower peers counts.
    """

    def __init__(self, device: torch.device, status: Status | None = None) -> None:
        self.status = status or Status()
        self.cuda = device.type == "cuda"
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, layer: int | None = None) -> Iterator[None]:
        """`layer`: the layer whose all-to-all it is."""
        before = self.status.inside("the all-to-all", layer)
        if self.cuda:
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
