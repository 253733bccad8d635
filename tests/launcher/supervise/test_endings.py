"""Which of the ranks that have failed is named."""

from __future__ import annotations

import signal

import pytest

from launcher.supervise.exit_status import Ended, verdict

LOST = "rank {}: RuntimeError: [pair.cc:537] Read error [127.0.0.1]:749: Connection reset by peer"
BROKEN = "rank {}: ZeroDivisionError: the fuse was short"
FIRST, SECOND = "rank 0 (pid 100) was ended by", "rank 1 (pid 101) was ended by"


@pytest.mark.parametrize(
    ("codes", "told", "named"),
    [
        ((1, -signal.SIGKILL), {0: LOST}, SECOND),
        ((1, -signal.SIGKILL), {0: BROKEN}, SECOND),
        ((1, -signal.SIGABRT), {0: LOST}, SECOND),
        ((1, -signal.SIGABRT), {0: BROKEN}, BROKEN.format(0)),
        ((1, 7), {0: LOST}, "rank 1 (pid 101) ended with exit code 7"),
        ((1, 1), {0: LOST, 1: BROKEN}, BROKEN.format(1)),
        ((1, 1), {0: LOST, 1: LOST}, LOST.format(0)),
        ((-signal.SIGSEGV, 1), {1: LOST}, FIRST),
    ],
)
def test_the_cause_is_named_and_not_who_has_lost_a_peer(
    codes: tuple[int, int], told: dict[int, str], named: str
) -> None:
    """Seen to fail with the first rank that spoke taken for the cause."""
    failed = [Ended(rank, 100 + rank, code) for rank, code in enumerate(codes)]
    end = verdict(failed, {rank: text.format(rank) for rank, text in told.items()}, {}, None, alone=False)
    assert end.line is not None
    assert end.line.startswith(f"error: {named}")
