"""One thread that steps the engine, and requests that join and leave between two steps.

On several ranks rank 0 alone hears clients; what it has heard goes to all before each step, so that every engine gets
the same requests in the same order.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.generate.options import SamplingOptions
from moe_dist.generate.requests import Event
from moe_dist.serve.load import ServedLoad

logger = logging.getLogger(__name__)

Command = tuple[str, int, list[int], SamplingOptions | None]
"""What to do (add, cancel, load, stop), a ticket, a prompt, how to go on from it."""
_STOP: Command = ("stop", 0, [], None)


@dataclass(frozen=True)
class Load:
    """Tokens so far by layer, for each expert, of all ranks."""

    by_layer: dict[int, list[int]]


News = Event | Load | Exception
IDLE_SECONDS = 5.0
"""Other ranks, which wait for rank 0 in a collective, hear so often that there is nothing to do."""


class OverloadedError(RuntimeError):
    """More requests than may wait."""


class EngineFailedError(RuntimeError):
    """The engine has ended; the text says how."""


def step_for_ever(
    engine: MoEInferenceEngine,
    hear: Callable[[bool], list[Command]],
    tell: Callable[[list[tuple[int, News]]], None],
) -> None:
    """On every rank, until rank 0 says stop.

    `hear(is_busy)` gives rank 0 what to do and waits when nothing is under way; `tell` gets what is new, and for which
    ticket.
    """
    load = ServedLoad(engine)
    tickets: dict[int, int] = {}
    numbers: dict[int, int] = {}
    is_busy = False
    while True:
        commands = engine.mesh.ask_rank_zero(partial(hear, is_busy))
        news: list[tuple[int, News]] = []
        for verb, ticket, tokens, options in commands:
            if verb == "stop":
                return
            if verb == "load":
                news.append((ticket, Load(load.of_all_ranks())))
                continue
            if verb == "cancel":
                if ticket in numbers:
                    engine.cancel(numbers[ticket])
                continue
            assert options is not None
            try:
                number = engine.add(tokens, options)
            except ValueError as error:
                news.append((ticket, error))
                continue
            tickets[number], numbers[ticket] = ticket, number
        if is_busy or commands:
            events, is_busy = engine.step()
            for event in events:
                ticket = tickets[event.request]
                news.append((ticket, event))
                if event.finished is not None:
                    del tickets[event.request], numbers[ticket]
        tell(news)


class EngineThread:
    """Rank 0's engine and its clients. `submit` and `cancel` are called in an event loop, all else in the thread."""

    def __init__(self, engine: MoEInferenceEngine, max_waiting: int) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self.failure: str | None = None
        self.failed: Callable[[], None] = lambda: None
        """Called in the loop once the engine has failed."""
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._listeners: dict[int, Callable[[News], None]] = {}
        self._tickets = itertools.count()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def num_requests(self) -> int:
        """Those under way or waiting."""
        return len(self._listeners)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self, seconds: float = 30.0) -> None:
        """End the thread, on all ranks. What is under way is forgotten."""
        self._commands.put(_STOP)
        self._thread.join(seconds)

    def submit(self, tokens: list[int], options: SamplingOptions, listener: Callable[[News], None]) -> int:
        """A ticket; `listener` gets events until one is finished, or an exception, in the loop.

        Raises OverloadedError and EngineFailedError.
        """
        if self.failure is not None:
            raise EngineFailedError(self.failure)
        if len(self._listeners) >= self.engine.max_rows + self.max_waiting:
            raise OverloadedError(f"{len(self._listeners)} requests are under way or wait: no more may")
        ticket = next(self._tickets)
        self._listeners[ticket] = listener
        self._commands.put(("add", ticket, tokens, options))
        return ticket

    async def load(self) -> dict[int, list[int]]:
        """Between this step and the next. Raises EngineFailedError."""
        if self.failure is not None:
            raise EngineFailedError(self.failure)
        answer: asyncio.Future[News] = asyncio.get_running_loop().create_future()
        ticket = next(self._tickets)
        self._listeners[ticket] = lambda event: None if answer.done() else answer.set_result(event)
        self._commands.put(("load", ticket, [], None))
        found = await answer
        if isinstance(found, Load):
            return found.by_layer
        assert isinstance(found, Exception)
        raise found

    def cancel(self, ticket: int) -> None:
        """Its place in the batch is free from the next step on; nobody listens any more. Known or not."""
        if self._listeners.pop(ticket, None) is not None:
            self._commands.put(("cancel", ticket, [], None))

    def _hear(self, is_busy: bool) -> list[Command]:
        found: list[Command] = []
        with suppress(queue.Empty):
            if not is_busy:
                found.append(self._commands.get(timeout=IDLE_SECONDS))
            while True:
                found.append(self._commands.get_nowait())
        return found

    def _tell(self, news: list[tuple[int, News]]) -> None:
        if news and self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended: so has everybody who listened
                self._loop.call_soon_threadsafe(self._deliver, news)

    def _deliver(self, news: list[tuple[int, News]]) -> None:
        for ticket, event in news:
            is_last = not isinstance(event, Event) or event.finished is not None
            listener = self._listeners.pop(ticket, None) if is_last else self._listeners.get(ticket)
            if listener is not None:
                listener(event)

    def _run(self) -> None:
        try:
            step_for_ever(self.engine, self._hear, self._tell)
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            logger.error("rank %d: the engine has failed: %s", self.engine.mesh.rank, text)
            if self._loop is not None:
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._fail, text)

    def _fail(self, text: str) -> None:
        self.failure = text
        self._deliver([(ticket, EngineFailedError(text)) for ticket in list(self._listeners)])
        self.failed()
