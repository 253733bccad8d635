"""Which of the ranks that have failed is named."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launcher.supervise import oom_advice
from launcher.supervise.exit_status import Ended, verdict
from launcher.supervise.oom_advice import OomKills, advice
from moe_dist.parallel.status import Position

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
    end = verdict(failed, {rank: text.format(rank) for rank, text in told.items()}, {}, None, False, OomKills())
    assert end.line is not None
    assert end.line.startswith(f"error: {named}")


@pytest.mark.parametrize(
    ("error", "step", "lacks"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."), 3, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 3, True),
        (MemoryError(), 3, True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."), 0, False),
        (RuntimeError("the fuse was short"), 3, False),
    ],
)
def test_a_step_that_lacks_memory_is_told_from_other_ends(error: Exception, step: int, lacks: bool) -> None:
    """Smaller micro-batches help in a step alone: not where the model itself has no room. Seen to fail at step 0."""
    told = {0: LOST.format(0), 1: f"rank 1: {type(error).__name__}: {error}{advice(error)}; log: x"}
    failed = [Ended(rank, 100 + rank, 1) for rank in (0, 1)]
    places = {rank: Position(0.1, step, "computing", None) for rank in (0, 1)}
    assert verdict(failed, told, places, None, False, OomKills()).lacks_memory is lacks


def test_one_rank_that_the_kernel_has_killed_is_not_all_that_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start ends by `kill -9`. Seen to fail with the count of when this process began, not its ranks."""
    counts = tmp_path / "vmstat"
    monkeypatch.setattr(oom_advice, "VMSTAT", counts)

    def line_after(number: int, later: int) -> str:
        """Of a rank that has got SIGKILL: the kernel had killed so many when it began, and so many when it ended."""
        counts.write_text(f"nr_free_pages 7\noom_kill {number}\n")
        oom_kills = OomKills()
        counts.write_text(f"nr_free_pages 5\noom_kill {later}\n")
        return verdict([Ended(0, 100, -signal.SIGKILL)], {}, {}, None, True, oom_kills).line or ""

    assert "SIGKILL, probably by the kernel's OOM killer (less of it, " in line_after(3, 4)
    assert line_after(4, 4).endswith("was ended by SIGKILL, by a person or by the kernel's OOM killer")
