"""What all ranks must know before the next step, and what people or a scheduler ask of a run from outside."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import NamedTuple

import torch

from moe_dist.parallel.mesh import Mesh
from moe_dist.train.interrupts import Interrupts


class StopRequests:
    """Notes SIGTERM, SIGUSR1, SIGHUP and Ctrl-C inside a `with` block, so that a run ends at the end of a step.

    `number` is the first signal that came, None while there is none; however many follow, they are one request. Only
    Ctrl-C after Ctrl-C stops at once, as ever. Outside the main thread, and for signals that are ignored, nothing is
    changed.
    """

    def __init__(self, heard: Callable[[], object] = lambda: None, last_words: bool = False) -> None:
        """`heard` is called when the first one comes, in the middle of whatever this process does. `last_words`: no
        handler is restored, for a process that ends then, and must not be cut off before it has said how."""
        self.number: int | None = None
        self._heard, self._last_words = heard, last_words
        self._before: dict[int, object] = {}
        self._interrupts = Interrupts()

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
                before = signal.getsignal(number)
                if before != signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupts.again():
            raise KeyboardInterrupt
        if self.number is None:
            self.number = number
            self._heard()

    def __exit__(self, *exception: object) -> None:
        if self._last_words:
            return
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]


class Agreed(NamedTuple):
    """The same on every rank."""

    elapsed: float
    """Seconds of training, by rank 0's clock."""
    signal: int | None
    """A signal that any rank has been sent; the highest number when they differ."""
    save_ended: bool
    """The save in flight has ended, well or not: everybody settles it."""


def agree(mesh: Mesh, elapsed: float, number: int | None, save_failed: bool, save_ended: bool) -> Agreed:
    """One reduction of a few numbers between two steps (collective)."""
    mine = torch.zeros(3 + signal.NSIG, dtype=torch.float64)
    mine[0] = elapsed if mesh.rank == 0 else 0.0
    mine[1], mine[2] = float(save_failed), float(save_ended)
    if number is not None:
        mine[3 + number] = 1.0
    values = mesh.sum_over("world", mine.to(mesh.device)).tolist()
    sent = [index for index, count in enumerate(values[3:]) if count]
    return Agreed(values[0], sent[-1] if sent else None, bool(values[1] or values[2]))
