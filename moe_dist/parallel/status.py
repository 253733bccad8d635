"""Where each rank is, for whoever watches from outside: a few bytes of shared memory per rank. Imports no torch.

A rank that is stopped, cut off or dead cannot say where it is; the last thing it wrote still does.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
from typing import Any, NamedTuple

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
OWN = ("waiting for data", "computing", "updating weights")
"""Phases in which a rank waits for no other, but where FSDP or a pipeline communicates in the middle of computing."""
_WHOLE = frozenset(PHASES.index(phase) for phase in ("starting", "evaluating", "saving", "ending"))
"""Phases whose seconds are their own also while something else goes on inside."""
_RECORD = struct.Struct("<dqiidi")
_SIGN = struct.Struct("<di")
SLOT, _SIGN_AT = 2048, 64
"""Bytes per rank; where in them its last sign of life is: the moment, a length, and as many bytes of JSON."""


class Position(NamedTuple):
    """Where a rank was when it last said so: `seconds` ago, in this phase of this step (from 1; 0: before any)."""

    seconds: float
    step: int
    phase: str
    layer: int | None
    begun: int = 0
    """Steps it has begun since it was started."""
    longest: float = 0.0
    """The most seconds for which it has not moved, in this step or the one before."""

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" of layer {self.layer}"
        step = "before the first step" if self.step == 0 else f"in step {self.step}"
        return f"{step}, {self.phase}{layer}"


class Status:
    """One rank's slot, and its stopwatch. Without a board it keeps quiet, and costs nothing worth measuring with one.

    `seconds` (as many as PHASES) has what each phase has taken since the last `take`, by the host's clock: on CUDA a
    phase in which the host waits for the device has the device's time.
    """

    def __init__(self, board: mmap.mmap | None = None, rank: int = 0) -> None:
        self._board, self._offset = board, rank * SLOT
        self.step, self.phase, self.layer = 0, 0, -1
        self.begun, self._longest, self._longest_before = 0, 0.0, 0.0
        self.seconds = [0.0] * len(PHASES)
        self._since, self._charged = time.monotonic(), 0

    def at(self, phase: str, layer: int | None = None, step: int | None = None) -> None:
        """This rank is about to do something else."""
        number = PHASES.index(phase)
        self._set(number, -1 if layer is None else layer, number, step)

    def _set(self, phase: int, layer: int, charged: int, step: int | None = None) -> None:
        now = time.monotonic()  # the machine's, the same for every process on it
        stretch = now - self._since
        self.seconds[self._charged] += stretch
        self._longest = max(self._longest, stretch)
        self._since, self._charged = now, charged
        self.phase, self.layer = phase, layer
        if step is not None:
            self.step, self.begun = step, self.begun + 1
            self._longest_before, self._longest = self._longest, 0.0
        if self._board is not None:
            longest = max(self._longest_before, self._longest)
            _RECORD.pack_into(self._board, self._offset, now, self.step, phase, layer, longest, self.begun)

    def alive(self) -> None:
        """What this rank does goes on, and it is still in the same phase."""
        self._set(self.phase, self.layer, self._charged)

    def tell(self, sign: dict[str, Any]) -> None:
        """A sign of life, with what only this process can know; from a thread of its own."""
        text = json.dumps(sign).encode()
        if self._board is not None and len(text) <= SLOT - _SIGN_AT - _SIGN.size:
            start = self._offset + _SIGN_AT
            self._board[start + _SIGN.size : start + _SIGN.size + len(text)] = text
            _SIGN.pack_into(self._board, start, time.monotonic(), len(text))

    def inside(self, phase: str, layer: int | None) -> tuple[int, int, int]:
        """As `at`; returns what `back` needs to undo it. Inside an evaluation or a save the seconds are that one's."""
        before = self.phase, self.layer, self._charged
        number = PHASES.index(phase)
        self._set(number, -1 if layer is None else layer, self._charged if self._charged in _WHOLE else number)
        return before

    def back(self, before: tuple[int, int, int]) -> None:
        """Whatever was going on before `inside` goes on."""
        self._set(*before)

    @property
    def position(self) -> Position:
        """Where this rank is, for its other threads."""
        layer = None if self.layer < 0 else self.layer
        longest = max(self._longest_before, self._longest)
        return Position(time.monotonic() - self._since, self.step, PHASES[self.phase], layer, self.begun, longest)

    @property
    def own_seconds(self) -> float:
        """Seconds since the last `take` in which this rank waited for no other, up to the last change of phase."""
        return sum(self.seconds[PHASES.index(phase)] for phase in OWN)

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        self.alive()
        taken = dict(zip(PHASES, self.seconds, strict=True))
        self.seconds = [0.0] * len(PHASES)
        return taken


def read(board: mmap.mmap, rank: int) -> Position | None:
    """Where a rank is; None when it has said nothing yet."""
    moment, step, phase, layer, longest, begun = _RECORD.unpack_from(board, rank * SLOT)
    if moment == 0.0:
        return None
    return Position(time.monotonic() - moment, step, PHASES[phase], None if layer < 0 else layer, begun, longest)


def read_sign(board: mmap.mmap, rank: int) -> tuple[float, dict[str, Any]] | None:
    """How many seconds ago a rank has given its last sign of life, and what it said; None: none, or half of one."""
    start = rank * SLOT + _SIGN_AT
    moment, length = _SIGN.unpack_from(board, start)
    try:
        return time.monotonic() - moment, json.loads(board[start + _SIGN.size : start + _SIGN.size + length])
    except ValueError:
        return None
