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
    own_seconds: float, phase_seconds: Sequence[float], sent_bytes: int, received_rows: int, memory_bytes: int
) -> list[float]:
    """The row of one rank: `own_seconds` per step, then seconds of the interval in each of PHASE_KEYS, then sizes.

    As float64 all integers below 2^53 are exact.
    """
    assert len(phase_seconds) == len(PHASE_KEYS)
    return [own_seconds, *phase_seconds, sent_bytes, received_rows, memory_bytes]


def ranks_record(rows: Sequence[Sequence[float]], num_steps: int) -> RanksRecord:
    """The rows of all ranks over an interval of so many steps. Microseconds, so that a line of the log stays short."""
    keys, first = list(PHASE_KEYS), 1
    return RanksRecord(
        own_seconds=[round(row[0], 6) for row in rows],
        phase_seconds={
            key: [round(row[first + keys.index(key)] / max(1, num_steps), 6) for row in rows] for key in OF_A_STEP
        },
        sent_bytes=[int(row[-3]) for row in rows],
        received_rows=[int(row[-2]) for row in rows],
        memory_bytes=[int(row[-1]) for row in rows],
    )


def mean_phases(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """Seconds of the interval in each phase, mean over ranks."""
    return {key: sum(row[1 + index] for row in rows) / len(rows) for index, key in enumerate(PHASE_KEYS)}
