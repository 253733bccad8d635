"""Messages between ranks that are under way while this rank computes, and how much of their time it waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist

Interval = tuple[float, float]
GRADIENTS = "gradients"
"""Kind of the sums of gradients over replicas; other kinds are the ways of `comm_timer`."""
ALL = "all of it"


class Journey(NamedTuple):
    """From when to when (`time.perf_counter`) messages of a layer (None: of none) were under way, or waited for."""

    layer: int | None
    kind: str
    begin: float
    end: float


class Trace:
    """Journeys and waits of one rank, while somebody looks: each flight then has a thread that sees it land.

    For messages by gloo between memory of the host; of others nobody sees on the host when they land.
    """

    def __init__(self) -> None:
        self.journeys: list[Journey] = []
        self.waits: list[Journey] = []

    @contextmanager
    def waiting(self, layer: int | None, kind: str) -> Iterator[None]:
        """Inside, this rank computes nothing."""
        begin = time.perf_counter()
        yield
        self.waits.append(Journey(layer, kind, begin, time.perf_counter()))

    def take(self, steps: int = 1) -> list[Overlap]:
        """What has landed since the last call, by layer and kind, for each of so many steps; the last one is all of it
        together."""
        waits, journeys = self.waits, self.journeys
        self.waits, self.journeys = [], []
        covered = union((wait.begin, wait.end) for wait in waits)
        found = []
        for key in dict.fromkeys([one[:2] for one in (*waits, *journeys)] + [(None, ALL)]):
            mine = [[one for one in ones if key[1] == ALL or one[:2] == key] for ones in (waits, journeys)]
            exposed = sum(one.end - one.begin for one in mine[0])
            hidden = outside(union((one.begin, one.end) for one in mine[1]), covered)
            found.append(Overlap(*key, exposed / steps, hidden / steps))
        return found


class Overlap(NamedTuple):
    """Seconds for which this rank waited for messages, and for which they were under way while it computed."""

    layer: int | None
    kind: str
    exposed: float
    hidden: float

    @property
    def share(self) -> float:
        """Of both, what is hidden."""
        return self.hidden / (self.exposed + self.hidden)


class Flight:
    """Works that were started together. `land` waits for them, once."""

    def __init__(self, works: Sequence[dist.Work], layer: int | None, kind: str, trace: Trace | None) -> None:
        self._works, self._trace = works, trace
        self._error: Exception | None = None
        self._watcher: threading.Thread | None = None
        if trace is not None:
            self._watcher = threading.Thread(target=self._watch, args=(layer, kind, trace), daemon=True)
            self._watcher.start()

    def land(self) -> None:
        """Until all have arrived."""
        if self._watcher is not None:
            self._watcher.join()
            if self._error is not None:
                raise self._error
            return
        for work in self._works:
            work.wait()

    def _watch(self, layer: int | None, kind: str, trace: Trace) -> None:
        begin = time.perf_counter()
        try:
            for work in self._works:
                work.wait()
        except Exception as error:
            self._error = error
        trace.journeys.append(Journey(layer, kind, begin, time.perf_counter()))


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same seconds as intervals in order that do not overlap."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def outside(intervals: list[Interval], others: list[Interval]) -> float:
    """Seconds of `intervals` that are in none of `others`; both as `union` makes them."""
    shared = sum(max(0.0, min(end, stop) - max(begin, start)) for begin, end in intervals for start, stop in others)
    return sum(end - begin for begin, end in intervals) - shared
