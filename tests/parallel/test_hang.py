"""Whom a run waits for: the rules, on what ranks may have said last."""

from __future__ import annotations

import mmap
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.supervise.hang import TIMEOUT_AFTER_LOSS, RankState, diagnose_hang
from moe_dist.parallel.status import SLOT, Position, Status, read, read_sign

LIMIT = 60.0


def at(
    phase: str = "the all-to-all",
    *,
    seconds: float = 61.0,
    step: int = 7,
    layer: int | None = 0,
    begun: int = 2,
    longest: float = 0.0,
    **more: Any,
) -> RankState:
    return RankState(Position(seconds, step, phase, layer, begun, longest), **more)


def test_nobody_is_named_while_anyone_moves() -> None:
    """Seen to fail with `max` for `min`."""
    still = at()
    assert diagnose_hang({0: still, 1: at(seconds=59.0)}, LIMIT) is None
    assert diagnose_hang({0: still, 1: at(seconds=1.0, silent=58.0)}, LIMIT) is None
    assert diagnose_hang({0: at(begun=1), 1: at(begun=0)}, LIMIT) is None, "before the first step it may take any time"
    assert diagnose_hang({0: still, 1: at("computing", seconds=30.0, silent=30.0)}, LIMIT) is not None


@pytest.mark.parametrize("phase", ["saving", "ending", "evaluating"])
def test_a_slow_disk_is_not_a_hang(phase: str) -> None:
    """A save or the reading of a checkpoint that takes minutes without a sign, while the others wait for it.
    Seen to fail with one limit for all phases: the run was ended before the commit, and so was every start after it."""
    waiting = at("saving", seconds=599.0, inside="all_reduce", waited=0.4)
    assert diagnose_hang({0: at(phase, seconds=599.0), 1: waiting}, LIMIT) is None
    found = diagnose_hang({0: at(phase, seconds=601.0), 1: waiting._replace(silent=2.0)}, LIMIT)
    assert found is not None
    assert found.ranks == [0]
    for state in ("stopped", "cut", "gone"):
        assert diagnose_hang({0: at(phase, state=state), 1: at("saving", inside="all_reduce")}, LIMIT) is not None, (
            state
        )


def test_the_first_step_may_compile() -> None:
    """Of every start, also of one that goes on from step 1000. Seen to fail with the number of the step for it."""
    compiling = at("computing", begun=1, step=1000, seconds=500.0)
    waiting = at(begun=1, step=1000, seconds=500.0, inside="all_to_all_single")
    assert diagnose_hang({0: compiling, 1: waiting}, LIMIT) is None
    assert (
        diagnose_hang({0: compiling, 1: waiting._replace(position=waiting.position._replace(begun=0))}, LIMIT) is None
    )
    assert diagnose_hang({0: compiling._replace(state="stopped"), 1: waiting}, LIMIT) is not None
    assert diagnose_hang({0: compiling._replace(silent=40.0), 1: waiting}, LIMIT) is not None
    late = [one._replace(position=one.position._replace(seconds=601.0)) for one in (compiling, waiting)]
    assert diagnose_hang(dict(enumerate(late)), LIMIT) is not None


def test_all_wait_in_the_first_step() -> None:
    """Each in a collective for as long as the limit: then nobody compiles."""
    waiting = at("computing", begun=1, seconds=61.0, inside="all_reduce", waited=60.5)
    assert diagnose_hang({0: waiting, 1: waiting._replace(inside="broadcast")}, LIMIT) is not None
    assert diagnose_hang({0: waiting, 1: waiting._replace(waited=3.0)}, LIMIT) is None, (
        "it has moved between collectives"
    )


def test_a_slow_machine() -> None:
    """Micro-batches that take longer than the limit, in this step and the one before."""
    seen = {0: at("computing", seconds=100.0, longest=40.0), 1: at(seconds=100.0, longest=1.0)}
    assert diagnose_hang(seen, LIMIT) is None
    assert (
        diagnose_hang(seen | {0: at("computing", seconds=121.0, longest=40.0), 1: at(seconds=121.0)}, LIMIT) is not None
    )
    assert diagnose_hang(seen | {0: at("computing", seconds=100.0, longest=40.0, state="stopped")}, LIMIT) is not None


def test_what_a_rank_writes_down_is_what_its_launcher_reads(tmp_path: Path) -> None:
    """Step by step, with the longest time without a move of this step and the one before; and signs of life."""
    file = (tmp_path / "board").open("w+b")
    file.truncate(2 * SLOT)
    board = mmap.mmap(file.fileno(), 2 * SLOT)
    status = Status(board, 1)
    assert read(board, 1) is None
    for step in (41, 42, 43):
        status.at("computing", layer=3, step=step)
        if step == 41:
            time.sleep(0.05)
            status.alive()
        found = read(board, 1)
        assert found is not None
        assert found[1:5] == status.position[1:5] == (step, "computing", 3, step - 40)
        assert (found.longest >= 0.05) == (status.position.longest >= 0.05) == (step < 43)
    assert read_sign(board, 1) is None
    sign = {"inside": None, "calls": {"ep@0#7": 12}, "waited": 0.0}
    status.tell(sign)
    status.tell({"calls": {str(number): number for number in range(1000)}})  # more than there is room for
    age, told = read_sign(board, 1) or (9.0, {})
    assert 0.0 <= age < 9.0
    assert told == sign
    assert read(board, 0) is None


def test_who_was_last_heard_of_before_its_first_step() -> None:
    """Steps may be shorter than the time between two signs of life: a rank stopped in between would never be found."""
    found = diagnose_hang(
        {0: at(begun=2), 1: at("starting", begun=0, seconds=0.2, silent=61.0, state="stopped")}, LIMIT
    )
    assert found is not None
    assert found.ranks == [1]


@pytest.mark.parametrize(
    ("culprit", "how"),
    [
        (at("reducing gradients", state="stopped", silent=61.0, seconds=0.1), "it is stopped (SIGSTOP)"),
        (at("reducing gradients", silent=61.0, seconds=0.1), "nothing is heard of it: its link is cut, its host gone"),
        (at("reducing gradients", state="cut", silent=9.0, seconds=52.0), "nothing is heard of it: its link is cut"),
        (at("computing"), "its Python stack is in its log"),
        (at("waiting for data"), "its Python stack is in its log"),
        (at(calls={"world@0": 40, "ep@0": 56}), "its Python stack is in its log"),
    ],
    ids=["stopped", "silent", "cut", "computing", "reading", "one collective behind"],
)
def test_the_one_that_is_waited_for(culprit: RankState, how: str) -> None:
    """Seen to fail with each of the rules taken out."""
    calls = {"world@0": 40, "ep@0": 57}
    found = diagnose_hang({0: at(calls=calls), 1: culprit, 2: at(calls=calls)}, LIMIT, "host {}".format)
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
    found = diagnose_hang(seen, LIMIT)
    assert found is not None
    assert found.ranks == [3]
    assert "last collectives ep 9, dp 5" in found.text


def test_phases_that_communicate_inside() -> None:
    """FSDP gathers in the middle of computing: who is inside a collective waits."""
    found = diagnose_hang({0: at("computing", inside="all_gather_into_tensor"), 1: at("computing")}, LIMIT)
    assert found is not None
    assert found.ranks == [1]


def test_different_collectives_name_everybody_by_place() -> None:
    """FAULTS row 12: each has called one that the other has not."""
    seen = {
        0: at("the all-to-all", calls={"world@0": 40, "ep@0": 57}, inside="all_to_all_single"),
        1: at("reducing gradients", layer=None, calls={"world@0": 41, "ep@0": 56}, inside="all_reduce"),
        2: at("the all-to-all", calls={"world@0": 40, "ep@0": 57}, inside="all_to_all_single"),
    }
    found = diagnose_hang(seen, LIMIT)
    assert found is not None
    assert found.ranks == [0, 1, 2]
    assert "rank 0, rank 2 in step 7, the all-to-all of layer 0, in all_to_all_single, last collectives " in found.text
    assert "; rank 1 in step 7, reducing gradients, in all_reduce, last collectives world 41, ep 56" in found.text


def test_all_at_one_place() -> None:
    found = diagnose_hang({0: at(seconds=61.0), 1: at(seconds=65.0)}, LIMIT)
    assert found is not None
    assert found.ranks == [1]


def test_a_rank_that_has_gone_is_not_waited_for_as_long() -> None:
    gone = at("computing", seconds=0.2, state="gone")
    assert diagnose_hang({0: at(seconds=TIMEOUT_AFTER_LOSS - 1), 1: gone}, LIMIT) is None
    found = diagnose_hang({0: at(seconds=TIMEOUT_AFTER_LOSS), 1: gone}, LIMIT)
    assert found is not None
    assert found.ranks == [1]
    assert found.text.startswith("rank 1 has gone, last seen in step 7, computing")
    assert (
        diagnose_hang(
            {0: at(seconds=TIMEOUT_AFTER_LOSS), 1: at(state="cut", seconds=0.0, silent=TIMEOUT_AFTER_LOSS)}, LIMIT
        )
        is not None
    )


def test_a_whole_host_is_one_line_of_bearable_length() -> None:
    seen = {rank: at(silent=61.0 * (rank >= 8), seconds=61.0 * (rank < 8)) for rank in range(16)}
    found = diagnose_hang(seen, LIMIT)
    assert found is not None
    assert found.ranks == list(range(8, 16))
    assert found.text.count("has not moved") == 4
    assert "; and 4 more: nothing is heard of it" in found.text
