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
    sent_bytes: int,
    received_rows: int,
    memory_bytes: int,
    rows_to: Sequence[int] = (),
    ep_size: int = 1,
) -> list[float]:
    """The row of one rank: `own_seconds` per step, then seconds of the interval in each of PHASE_KEYS, then sizes, then
    with expert parallelism the rows to each of `ep_size` ranks (`rows_to`, empty where there are no experts).

    As float64 all integers below 2^53 are exact.
    """
    assert len(phase_seconds) == len(PHASE_KEYS)
    flow = (rows_to or [0] * ep_size) if ep_size > 1 else []
    return [own_seconds, *phase_seconds, sent_bytes, received_rows, memory_bytes, *flow]


def ranks_record(rows: Sequence[Sequence[float]], num_steps: int) -> RanksRecord:
    """The rows of all ranks over an interval of so many steps. Microseconds, so that a line of the log stays short."""
    keys, first, sizes = list(PHASE_KEYS), 1, 1 + len(PHASE_KEYS)
    return RanksRecord(
        own_seconds=[round(row[0], 6) for row in rows],
        phase_seconds={
            key: [round(row[first + keys.index(key)] / max(1, num_steps), 6) for row in rows] for key in OF_A_STEP
        },
        sent_bytes=[int(row[sizes]) for row in rows],
        received_rows=[int(row[sizes + 1]) for row in rows],
        memory_bytes=[int(row[sizes + 2]) for row in rows],
        rows_to=[[int(count) for count in row[sizes + 3 :]] for row in rows if len(row) > sizes + 3],
    )


def mean_phases(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """Seconds of the interval in each phase, mean over ranks."""
    return {key: sum(row[1 + index] for row in rows) / len(rows) for index, key in enumerate(PHASE_KEYS)}
