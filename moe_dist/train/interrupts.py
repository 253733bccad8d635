"""Ctrl-C once, and Ctrl-C again. Imports no torch."""

from __future__ import annotations

import time

APART = 0.3
"""Seconds between two Ctrl-C of a person. Closer together it is one, which a shell or `make` has passed on as well."""


class Interrupts:
    """Counts what a person types, not what arrives."""

    def __init__(self) -> None:
        self._last: float | None = None

    def again(self) -> bool:
        """One more SIGINT has come: whether a person insists."""
        before, self._last = self._last, time.monotonic()
        return before is not None and self._last - before >= APART
