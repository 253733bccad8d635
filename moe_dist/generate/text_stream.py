"""Tokens to text as they come: whole characters only, and nothing that may be the start of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
"""What stands for bytes that are no character yet."""


class TextStream:
    """The text of one answer."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._tokens: list[int] = []
        self._start = self._read = 0
        self._held = ""
        self.stopped = False
        """Whether a stop text has come: what follows it is no part of the answer."""

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """The text that these tokens add, as far as it is final; with `last` all that is left."""
        self._tokens += tokens
        # Tokens before are decoded too, for those who write spaces between words.
        before = self._decode(self._tokens[self._start : self._read])
        now = self._decode(self._tokens[self._start :])
        fresh = ""
        if last or (len(now) > len(before) and not now.endswith(_BROKEN)):
            fresh = now[len(before) :]
            self._start, self._read = self._read, len(self._tokens)
        return self._without_stop(fresh, last)

    def _without_stop(self, fresh: str, last: bool) -> str:
        text = self._held + fresh
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        held = 0
        if not last:
            sizes = (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size]))
            held = max(sizes, default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
