"""Ctrl-C once, and Ctrl-C again. Imports no torch."""

from __future__ import annotations

import time

APART = 0.3
"""Seconds after a first Ctrl-C in which another is no second: a shell or `make` has passed it on as well."""


class Interrupts:
    """Counts what a person types, not what arrives."""

    def __init__(self) -> None:
        self._first: float | None = None

    def again(self) -> bool:
        """One more SIGINT has come: whether a person insists."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
        return now - self._first >= APART
