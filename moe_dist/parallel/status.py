"""Where each rank is, for whoever watches from outside: a few bytes of shared memory per rank. Imports no torch.

A rank that is stopped, cut off or dead cannot say where it is; the last thing it wrote still does.
"""

from __future__ import annotations

import mmap
import struct
import time
from typing import NamedTuple

PHASES = (
    "starting",
    "waiting for data",
    "computing",
    "the all-to-all",
    "reducing gradients",
    "updating weights",
    "agreeing on the next step",
    "logging",
    "evaluating",
    "saving",
    "ending",
)
_RECORD = struct.Struct("<dqii")
SLOT = 64
"""Bytes per rank."""


class Place(NamedTuple):
    """Where a rank was when it last said so: `seconds` ago, in this phase of this step (from 1; 0: before any)."""

    seconds: float
    step: int
    phase: str
    layer: int | None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" of layer {self.layer}"
        step = "before the first step" if self.step == 0 else f"in step {self.step}"
        return f"{step}, {self.phase}{layer}"


class Status:
    """One rank's slot. Without a board it keeps quiet, and costs nothing worth measuring with one."""

    def __init__(self, board: mmap.mmap | None = None, rank: int = 0) -> None:
        self._board, self._offset = board, rank * SLOT
        self.step, self.phase, self.layer = 0, 0, -1

    def at(self, phase: str, layer: int | None = None, step: int | None = None) -> None:
        """This rank is about to do something else."""
        self._set(PHASES.index(phase), -1 if layer is None else layer, step)

    def _set(self, phase: int, layer: int, step: int | None = None) -> None:
        self.phase, self.layer = phase, layer
        if step is not None:
            self.step = step
        if self._board is not None:
            # The clock is the machine's, the same for every process on it.
            _RECORD.pack_into(self._board, self._offset, time.monotonic(), self.step, phase, layer)

    def inside(self, phase: str, layer: int | None) -> tuple[int, int]:
        """As `at`; returns what `back` needs to undo it."""
        before = self.phase, self.layer
        self.at(phase, layer)
        return before

    def back(self, before: tuple[int, int]) -> None:
        """Whatever was going on before `inside` goes on."""
        self._set(*before)


def read(board: mmap.mmap, rank: int) -> Place | None:
    """Where a rank is; None when it has said nothing yet."""
    moment, step, phase, layer = _RECORD.unpack_from(board, rank * SLOT)
    if moment == 0.0:
        return None
    return Place(time.monotonic() - moment, step, PHASES[phase], None if layer < 0 else layer)
