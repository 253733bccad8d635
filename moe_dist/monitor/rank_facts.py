"""What every rank tells about itself in the reduction of a logging interval: a row of numbers there and back."""

from __future__ import annotations

from collections.abc import Sequence

from moe_dist.monitor.records import RanksRecord

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


def pack_row(
    own_seconds: float,
    phase_seconds: Sequence[float],
    way_seconds: tuple[float, float],
    received_rows: int,
    memory_bytes: int,
    rows_to: Sequence[int] = (),
    bytes_to: Sequence[int] = (),
    ep_size: int = 1,
) -> list[float]:
    """The row of one rank: `own_seconds` per step, then seconds of the interval in each of PHASE_KEYS and in dispatch
    and combine, then sizes, then with expert parallelism the rows and the bytes to each of `ep_size` ranks (empty where
    there are no experts).

    As float64 all integers below 2^53 are exact.
    """
    assert len(phase_seconds) == len(PHASE_KEYS)
    flow = [*(rows_to or [0] * ep_size), *(bytes_to or [0] * ep_size)] if ep_size > 1 else []
    return [own_seconds, *phase_seconds, *way_seconds, received_rows, memory_bytes, *flow]


def ranks_record(rows: Sequence[Sequence[float]], num_steps: int) -> RanksRecord:
    """The rows of all ranks over an interval of so many steps. Microseconds, so that a line of the log stays short."""
    keys, ways, sizes = list(PHASE_KEYS), 1 + len(PHASE_KEYS), 3 + len(PHASE_KEYS)
    flow = sizes + 2
    middle = (flow + len(rows[0])) // 2

    def per_step(column: int) -> list[float]:
        return [round(row[column] / max(1, num_steps), 6) for row in rows]

    return RanksRecord(
        own_seconds=[round(row[0], 6) for row in rows],
        phase_seconds={key: per_step(1 + keys.index(key)) for key in OF_A_STEP},
        dispatch_seconds=per_step(ways),
        combine_seconds=per_step(ways + 1),
        received_rows=[int(row[sizes]) for row in rows],
        memory_bytes=[int(row[sizes + 1]) for row in rows],
        sent_bytes=[int(sum(row[middle:])) for row in rows],
        rows_to=[[int(count) for count in row[flow:middle]] for row in rows if middle > flow],
        bytes_to=[[int(count) for count in row[middle:]] for row in rows if middle > flow],
    )


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


def mean_phases(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """Seconds of the interval in each phase, mean over ranks."""
    return {key: sum(row[1 + index] for row in rows) / len(rows) for index, key in enumerate(PHASE_KEYS)}
