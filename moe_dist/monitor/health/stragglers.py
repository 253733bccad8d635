"""Which rank keeps the others waiting: one rule, on the seconds in which a rank waits for nobody."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

SLOW = 2.0
"""A rank is slow when its own seconds are this many times the median of the others' ..."""
NOTABLE = 0.1
"""... and exceed it by this share of the step, so that noise in microseconds is no news."""
PATIENCE = 3
"""A straggler has been slow in this many logging intervals in a row."""


class Stragglers:
    """Watches the own seconds of every rank, per step, as the median over the steps of each logging interval.

    Two filters against noise: the median within an interval ignores fewer than half of its steps, however long they
    took, and the interval that follows has to say the same, `PATIENCE` times. Ranks are compared with those that do
    the same work: `groups` has a key for each rank, such as its pipeline stage. The median is of the *others*: of two
    ranks, neither could be twice the median of both.
    """

    def __init__(self, groups: Sequence[int], patience: int = PATIENCE) -> None:
        self.groups, self.patience = list(groups), patience
        self._slow_for = [0] * len(self.groups)
        self.slowest_ratio = 0.0
        """Largest own seconds / median of the others in the last interval; 0.0: nobody to compare with."""

    def observe(self, own_seconds: Sequence[float], step_seconds: float) -> list[int]:
        """The ranks that have been slow for `patience` intervals, with this one."""
        self.slowest_ratio = 0.0
        for key in set(self.groups):
            ranks = [rank for rank, group in enumerate(self.groups) if group == key]
            ordered = sorted(own_seconds[rank] for rank in ranks)
            for rank in ranks if len(ranks) > 1 else ():
                own = own_seconds[rank]
                others = median_without(ordered, own)
                ratio = own / max(others, 1e-9)
                self.slowest_ratio = max(self.slowest_ratio, ratio)
                is_slow = ratio >= SLOW and own - others >= NOTABLE * step_seconds
                self._slow_for[rank] = self._slow_for[rank] + 1 if is_slow else 0
        return [rank for rank, count in enumerate(self._slow_for) if count >= self.patience]


def median_without(ordered: Sequence[float], value: float) -> float:
    """Median of sorted numbers without one `value` that is among them; there are at least two."""
    gone, middle = bisect_left(ordered, value), (len(ordered) - 1) // 2

    def at(index: int) -> float:
        return ordered[index if index < gone else index + 1]

    return at(middle) if (len(ordered) - 1) % 2 else (at(middle - 1) + at(middle)) / 2
