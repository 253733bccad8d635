"""What of a message's time is waited for, and what is hidden behind computing."""

from __future__ import annotations

import time
from typing import Any

import pytest

from moe_dist.parallel.flight import ALL, Flight, Journey, Trace, outside, union


class Message:
    """Arrives after some time."""

    def __init__(self, seconds: float, error: Exception | None = None) -> None:
        self.seconds, self.error = seconds, error

    def wait(self) -> None:
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error


def flight_of(message: Any, trace: Trace | None) -> Flight:
    return Flight([message], 3, "combine", trace)


def test_seconds_of_intervals() -> None:
    assert union([(5.0, 6.0), (1.0, 2.0), (1.5, 3.0), (3.0, 4.0)]) == [(1.0, 4.0), (5.0, 6.0)]
    assert union([]) == []
    assert outside([(0.0, 4.0), (5.0, 8.0)], [(1.0, 2.0), (3.0, 6.0), (9.0, 10.0)]) == 1.0 + 1.0 + 2.0


def test_a_message_is_hidden_only_while_something_is_computed() -> None:
    """Layer 1 travels while layer 0 is waited for: that second hides nothing. Seen to fail with journeys less their own
    waits alone.
    """
    trace = Trace()
    trace.journeys += [Journey(0, "dispatch", 0.0, 3.0), Journey(1, "dispatch", 1.0, 6.0), Journey(None, "g", 5.0, 7.0)]
    trace.waits += [Journey(0, "dispatch", 2.0, 3.0), Journey(1, "dispatch", 5.5, 6.0)]
    found = {one[:2]: one[2:] for one in trace.take(2)}
    assert found == {
        (0, "dispatch"): (0.5, 1.0),
        (1, "dispatch"): (0.25, 1.75),
        (None, "g"): (0.0, 0.75),
        (None, ALL): (0.75, 2.75),
    }
    assert trace.take() == [(None, ALL, 0.0, 0.0)]


def test_who_looks_sees_when_it_lands() -> None:
    """Not when somebody waits for it."""
    trace = Trace()
    flight = flight_of(Message(0.01), trace)
    time.sleep(1.0)
    begin = time.perf_counter()
    with trace.waiting(3, "combine"):
        flight.land()
    (journey,), (wait,) = trace.journeys, trace.waits
    assert journey.end < begin <= wait.begin
    assert journey.end - journey.begin >= 0.01


@pytest.mark.parametrize("looked", [False, True])
def test_an_error_of_a_message_is_raised_where_it_is_waited_for(looked: bool) -> None:
    flight = flight_of(Message(0.0, RuntimeError("connection lost")), Trace() if looked else None)
    with pytest.raises(RuntimeError, match="connection lost"):
        flight.land()
