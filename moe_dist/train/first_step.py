"""Until the first step is done: what goes on, so that nobody waits in the dark."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from moe_dist.monitor.sinks.text import duration
from moe_dist.train.callbacks import Callback, RunState

FIRST, BETWEEN = 3.0, 10.0
"""Seconds of silence before the first line, and between two."""


class FirstStep(Callback):
    """A thread that says every few seconds what `activity` is, with a clock, until `done`. Quick starts stay quiet."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.activity: Callable[[], str] = lambda: "starting"
        self.say = say
        self._done = threading.Event()
        self._started = time.monotonic()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """From now on."""
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="first-step", daemon=True)
        self._thread.start()

    def at(self, words: str) -> None:
        """What goes on now."""
        self.activity = lambda: words

    def on_step_end(self, run: RunState) -> None:
        """The first is the last that is waited for."""
        self.done()

    def done(self) -> None:
        """No further line; may be called twice, and without `begin`."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        pause = FIRST
        while not self._done.wait(pause):
            self.say(f"{duration(time.monotonic() - self._started)}  {self.activity()}")
            pause = BETWEEN
