"""What every rank tells about itself in the reduction of a logging interval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

from moe_dist.monitor.metric import metrics_of
from moe_dist.monitor.metrics import mean
from moe_dist.monitor.records import RanksRecord, TrainRecord

PHASE_KEYS = {
    "data": "waiting for data",
    "computing": "computing",
    "all_to_all": "the all-to-all",
    "gradients": "reducing gradients",
    "optimizer": "updating weights",
    "agreeing": "agreeing on the next step",
    "logging": "logging",
    "evaluation": "evaluating",
    "checkpoint": "saving",
}
"""Key in the records -> phase, as `parallel.status` names it."""
OF_A_STEP = ("data", "computing", "all_to_all", "gradients", "optimizer", "agreeing")
"""Phases that every step has."""


@dataclass(frozen=True)
class RankFacts:
    """What one rank tells about a logging interval. As float64 all integers below 2^53 are exact."""

    own_seconds: float
    """Per step, median."""
    phase_seconds: Sequence[float]
    """Of the interval, in each of PHASE_KEYS."""
    dispatch_seconds: float
    combine_seconds: float
    """Of the interval, these two."""
    received_rows: float
    memory_bytes: float
    rows_to: Sequence[float] = ()
    """To each rank of the expert-parallel group; with expert parallelism all ranks have as many, or none."""
    bytes_to: Sequence[float] = ()

    def row(self) -> list[float]:
        """The fields one after the other, to travel."""
        values = [getattr(self, item.name) for item in fields(self)]
        return [number for value in values for number in (value if isinstance(value, Sequence) else (value,))]

    def of_row(self, row: Iterable[float]) -> RankFacts:
        """The facts of another rank from its row, which is laid out as this one's."""
        rest = iter(row)

        def taken(like: float | Sequence[float]) -> Any:
            return list(islice(rest, len(like))) if isinstance(like, Sequence) else next(rest)

        return RankFacts(*(taken(getattr(self, item.name)) for item in fields(self)))


def ranks_record(ranks: Sequence[RankFacts], num_steps: int) -> RanksRecord:
    """All ranks over an interval of so many steps. Microseconds, so that a line of the log stays short."""

    def per_step(seconds: Iterable[float]) -> list[float]:
        return [round(one / max(1, num_steps), 6) for one in seconds]

    keys = list(PHASE_KEYS)
    return RanksRecord(
        own_seconds=[round(rank.own_seconds, 6) for rank in ranks],
        phase_seconds={key: per_step(rank.phase_seconds[keys.index(key)] for rank in ranks) for key in OF_A_STEP},
        dispatch_seconds=per_step(rank.dispatch_seconds for rank in ranks),
        combine_seconds=per_step(rank.combine_seconds for rank in ranks),
        received_rows=[int(rank.received_rows) for rank in ranks],
        memory_bytes=[int(rank.memory_bytes) for rank in ranks],
        sent_bytes=[int(sum(rank.bytes_to)) for rank in ranks],
        rows_to=[[int(count) for count in rank.rows_to] for rank in ranks if rank.rows_to],
        bytes_to=[[int(count) for count in rank.bytes_to] for rank in ranks if rank.rows_to],
    )


def over_ranks(ranks: RanksRecord) -> dict[str, Any]:
    """Those numbers of the run that are a number of every rank, reduced as their metric says."""
    metrics = metrics_of(TrainRecord).values()
    return {metric.name: metric.reduce(getattr(ranks, metric.name)) for metric in metrics if metric.reduce is not None}


def bytes_between_hosts(ranks: RanksRecord, hosts: Sequence[str]) -> int:
    """What went to another host, of the interval; `hosts`: of each rank."""
    total = 0
    for rank, sent in enumerate(ranks.bytes_to):
        first = rank - rank % len(sent)  # ranks of a group are neighbours
        total += sum(size for peer, size in enumerate(sent, first) if hosts[peer] != hosts[rank])
    return total


def all_to_all_seconds(ranks: RanksRecord, ep_size: int) -> float:
    """Seconds of a step that the all-to-all itself takes: in each expert-parallel group those of the rank that waits
    least, since what the others spend more is waiting for that one; the highest of the groups.
    """
    both = [out + home for out, home in zip(ranks.dispatch_seconds, ranks.combine_seconds, strict=True)]
    return max(min(both[first : first + ep_size]) for first in range(0, len(both), ep_size))


def mean_phases(ranks: Sequence[RankFacts]) -> dict[str, float]:
    """Seconds of the interval in each phase, mean over ranks."""
    columns = zip(*(rank.phase_seconds for rank in ranks), strict=True)
    return {key: mean(seconds) for key, seconds in zip(PHASE_KEYS, columns, strict=True)}
