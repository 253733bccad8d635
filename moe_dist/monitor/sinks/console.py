"""The console, whatever it is: a terminal or a log."""

from __future__ import annotations

import os
import sys
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TextIO

from moe_dist.monitor.records import CheckpointRecord, EvalRecord, RunInfo, RunSummary, TrainRecord
from moe_dist.monitor.sinks.base import Sink

if TYPE_CHECKING:
    from rich.console import Console

Mode = Literal["auto", "live", "plain", "none"]


class ConsoleSink(Sink):
    """`live`: a rich area that follows the run; `plain`: one line per record; `none`: nothing.

    `auto` is `live` on a terminal that can draw it and `plain` elsewhere. `stream` is stdout by default;
    `console` replaces the rich console made for the stream. The environment variable NO_COLOR is obeyed.
    """

    name = "console"

    def __init__(self, mode: Mode = "auto", stream: TextIO | None = None, console: Console | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._given_console = console
        self.mode = ("live" if can_draw(self._stream) else "plain") if mode == "auto" else mode

    @cached_property
    def _renderer(self) -> Sink:
        if self.mode == "none":
            return Sink()
        if self.mode == "plain":
            from moe_dist.monitor.sinks.plain import PlainConsole

            return PlainConsole(self._stream)
        from rich.console import Console

        from moe_dist.monitor.sinks.live import LiveConsole

        # sys.stdout must not be pinned: rich then sees when something replaces it.
        file = None if self._stream is sys.stdout else self._stream
        return LiveConsole(self._given_console or Console(file=file, force_terminal=True, highlight=False))

    def open(self, info: RunInfo) -> None:
        self._renderer.open(info)

    def train(self, record: TrainRecord) -> None:
        self._renderer.train(record)

    def evaluation(self, record: EvalRecord) -> None:
        self._renderer.evaluation(record)

    def checkpoint(self, record: CheckpointRecord) -> None:
        self._renderer.checkpoint(record)

    def summary(self, summary: RunSummary) -> None:
        self._renderer.summary(summary)

    def message(self, text: str) -> None:
        self._renderer.message(text)

    def close(self) -> None:
        self._renderer.close()


def can_draw(stream: TextIO) -> bool:
    """Whether the stream is a terminal that moves its cursor and shows more than ASCII."""
    encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown") and encoding == "utf8"
