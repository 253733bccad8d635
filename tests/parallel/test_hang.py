"""Whom a run waits for: the rules, on what ranks may have said last."""

from __future__ import annotations

from typing import Any

import pytest

from moe_dist.parallel.hang import MOURNING, Sighting, judge
from moe_dist.parallel.status import Place

LIMIT = 60.0


def at(
    phase: str = "the all-to-all", *, seconds: float = 61.0, step: int = 7, layer: int | None = 0, **more: Any
) -> Sighting:
    return Sighting(Place(seconds, step, phase, layer), **more)


def test_nobody_is_named_while_anyone_moves() -> None:
    """Seen to fail with `max` for `min`."""
    still = at()
    assert judge({0: still, 1: at(seconds=59.0)}, LIMIT) is None
    assert judge({0: still, 1: at(seconds=1.0, silent=58.0)}, LIMIT) is None
    assert judge({0: at(step=1), 1: at(step=0)}, LIMIT) is None, "before the first step it may take any time"
    assert judge({0: still, 1: at("computing", seconds=30.0, silent=30.0)}, LIMIT) is not None


def test_who_was_last_heard_of_before_its_first_step() -> None:
    """Steps may be shorter than the time between two signs of life: a rank stopped in between would never be found."""
    found = judge({0: at(step=2), 1: at("starting", step=0, seconds=0.2, silent=61.0, state="stopped")}, LIMIT)
    assert found is not None
    assert found.ranks == [1]


@pytest.mark.parametrize(
    ("culprit", "how"),
    [
        (at("reducing gradients", state="stopped", silent=61.0, seconds=0.1), "it is stopped (SIGSTOP)"),
        (at("reducing gradients", silent=61.0, seconds=0.1), "nothing is heard of it: its link is cut, its host gone"),
        (at("computing"), "its Python stack is in its log"),
        (at("waiting for data"), "its Python stack is in its log"),
        (at(calls={"world@0": 40, "ep@0": 56}), "its Python stack is in its log"),
    ],
    ids=["stopped", "silent", "computing", "reading", "one collective behind"],
)
def test_the_one_that_is_waited_for(culprit: Sighting, how: str) -> None:
    """Seen to fail with each of the rules taken out."""
    calls = {"world@0": 40, "ep@0": 57}
    found = judge({0: at(calls=calls), 1: culprit, 2: at(calls=calls)}, LIMIT, "host {}".format)
    assert found is not None
    assert found.ranks == [1]
    assert found.text.startswith("host 1 has not moved for 61 s, in step 7, ")
    assert how in found.text


def test_who_waits_for_somebody_else_is_not_to_blame() -> None:
    """Rank 3 computes; its expert peer 2 waits for it, and 0 and 1 wait in another group for these two."""
    seen = {
        0: at("computing", calls={"ep@0": 10, "dp@0": 6}, inside="all_reduce"),
        1: at("computing", calls={"ep@0": 10, "dp@1": 6}, inside="all_reduce"),
        2: at(calls={"ep@2": 10, "dp@0": 5}),
        3: at("computing", calls={"ep@2": 9, "dp@1": 5}),
    }
    found = judge(seen, LIMIT)
    assert found is not None
    assert found.ranks == [3]
    assert "last collectives ep 9, dp 5" in found.text


def test_phases_that_communicate_inside() -> None:
    """FSDP gathers in the middle of computing: who is inside a collective waits."""
    found = judge({0: at("computing", inside="all_gather_into_tensor"), 1: at("computing")}, LIMIT)
    assert found is not None
    assert found.ranks == [1]


def test_different_collectives_name_everybody_by_place() -> None:
    """FAULTS row 12: each has called one that the other has not."""
    seen = {
        0: at("the all-to-all", calls={"world@0": 40, "ep@0": 57}, inside="all_to_all_single"),
        1: at("reducing gradients", layer=None, calls={"world@0": 41, "ep@0": 56}, inside="all_reduce"),
        2: at("the all-to-all", calls={"world@0": 40, "ep@0": 57}, inside="all_to_all_single"),
    }
    found = judge(seen, LIMIT)
    assert found is not None
    assert found.ranks == [0, 1, 2]
    assert "rank 0, rank 2 in step 7, the all-to-all of layer 0, in all_to_all_single, last collectives " in found.text
    assert "; rank 1 in step 7, reducing gradients, in all_reduce, last collectives world 41, ep 56" in found.text


def test_all_at_one_place() -> None:
    found = judge({0: at(seconds=61.0), 1: at(seconds=65.0)}, LIMIT)
    assert found is not None
    assert found.ranks == [1]


def test_a_rank_that_has_gone_is_not_waited_for_as_long() -> None:
    gone = at("computing", seconds=0.2, state="gone")
    assert judge({0: at(seconds=MOURNING - 1), 1: gone}, LIMIT) is None
    found = judge({0: at(seconds=MOURNING), 1: gone}, LIMIT)
    assert found is not None
    assert found.ranks == [1]
    assert found.text.startswith("rank 1 has gone, last seen in step 7, computing")


def test_a_whole_host_is_one_line_of_bearable_length() -> None:
    seen = {rank: at(silent=61.0 * (rank >= 8), seconds=61.0 * (rank < 8)) for rank in range(16)}
    found = judge(seen, LIMIT)
    assert found is not None
    assert found.ranks == list(range(8, 16))
    assert found.text.count("has not moved") == 4
    assert "; and 4 more: nothing is heard of it" in found.text
