"""When a record is logged with the load of every expert and the numbers of every rank: seldom enough for long runs."""

from __future__ import annotations

from dataclasses import replace

from moe_dist.monitor.health.rules import conditions, is_saturated
from moe_dist.monitor.records import TrainRecord

CELLS = 1_200_000
"""Loads of experts (and numbers of ranks) that are logged before detail thins out; see `Detail`."""
SOONER = 10
"""By this factor detail comes sooner when a layer gets into trouble or out of it."""


class Detail:
    """With `every`, detail comes every so many steps. Without, it comes with every record until some CELLS numbers are
    written, and from then on in steps that are a fixed share of the run so far: files grow with the logarithm of its
    length, and a start that goes on needs to know nothing of the ones before. 94 layers of 128 experts: every record of
    the first hundred, then one whenever the run is 1 % longer.
    """

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self._last: int | None = None
        self._troubles: list[object] = []

    def is_due(self, record: TrainRecord) -> bool:
        """Whether this record is logged in full."""
        size = sum(len(layer.tokens_per_expert) for layer in record.layers)
        if record.ranks is not None:
            size += len(record.ranks.own_seconds) * 12 + 2 * sum(map(len, record.ranks.rows_to))
        spacing = self.every or record.step * size / CELLS
        passed = spacing if self._last is None else abs(record.step - self._last)
        due = passed >= spacing
        if self.every is None:
            # What the doctor says of the records between two with detail is then true of them too.
            troubles: list[object] = [
                (layer.layer, tuple(conditions(layer).values()), is_saturated(layer)) for layer in record.layers
            ]
            troubles.append(tuple(record.stragglers))
            due = due or (troubles != self._troubles and passed >= spacing / SOONER)
            self._troubles = troubles if due else self._troubles
        self._last = record.step if due else self._last
        return due

    def thinned(self, record: TrainRecord) -> TrainRecord:
        """The record, without its detail unless that is due."""
        return record if self.is_due(record) else replace(record, layers=[], ranks=None)
