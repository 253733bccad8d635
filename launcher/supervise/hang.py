"""Nothing moves any more: whom does everybody wait for? One set of rules for all launchers. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from moe_dist.parallel.status import Position

WAITING = ("the all-to-all", "reducing gradients", "agreeing on the next step")
"""Phases in which a rank may be held up by others."""
TIMEOUT_AFTER_LOSS = 8.0
"""Seconds without progress after which a run ends that has lost a rank; most notice by themselves, and sooner."""
_LONG = ("starting", "evaluating", "saving", "ending")
"""Phases in which a rank may be busy with one thing for a long time: a disk flushes, an evaluation is compiled, the
best checkpoint is read. A save that makes progress moves."""
_EASE = 10
"""Times the limit in these, and in the first step of a start, which may compile."""
_SLOWER = 3
"""Times the longest that a rank has lately not moved for: a slow machine's micro-batch."""
_NAMED = 4
State = Literal["", "stopped", "cut", "gone"]
"""Stopped: by SIGSTOP. Cut: nothing reaches its host. Gone: it has left without a word, or has failed."""


class RankState(NamedTuple):
    """What is known of a rank. `position` is where it was when it was last heard of, `silent` seconds ago."""

    position: Position
    silent: float = 0.0
    state: State = ""
    inside: str | None = None
    """The function of torch.distributed that it was in."""
    waited: float = 0.0
    """Seconds for which it had been in it, without calling another."""
    calls: Mapping[str, int] = {}
    """Group -> collectives that this rank has called in it; the name people know ends at the @."""

    @property
    def still(self) -> float:
        """Seconds for which it has not moved, as far as anybody can know."""
        return self.position.seconds + self.silent

    @property
    def where(self) -> str:
        """Step, phase, layer, and the last collectives with their numbers."""
        calls = ", ".join(f"{name.partition('@')[0]} {number}" for name, number in self.calls.items())
        last = f", last collectives {calls}" if calls else ""
        return f"{self.position}{f', in {self.inside}' if self.inside else ''}{last}"


class HangDiagnosis(NamedTuple):
    """Whom everybody waits for, and a sentence about it."""

    ranks: list[int]
    text: str


def diagnose_hang(
    seen: Mapping[int, RankState], timeout: float, name: Callable[[int], str] = "rank {}".format
) -> HangDiagnosis | None:
    """None while anyone has moved within `timeout` seconds, or more where that may be work. `seen`: all ranks, or
    those this rank can hear of.

    Before the first step of a start ranks read data, which may take any time. Whoever cannot answer is named first:
    gone, stopped, cut off or silent. Then by the order of collectives: who has called fewer than the others of a group
    keeps them waiting, unless others keep it waiting. Then who is in a phase of its own. When all of them wait, and
    not in the same collective, they have called different collectives.
    """
    here = [sighting for sighting in seen.values() if sighting.state != "gone"]
    limit = _limit(seen, timeout)
    begun = [one.position.begun for one in seen.values()]
    # Who has begun a second step has had all the others in the first, whatever was last heard of them.
    starting = 0 in begun and max(begun) < 2
    if not here or starting or min(one.still for one in here) < limit:
        return None

    def those(which: Callable[[RankState], bool]) -> list[int]:
        return [rank for rank, sighting in sorted(seen.items()) if which(sighting)]

    def diagnosis(ranks: list[int], how: str) -> HangDiagnosis:
        names = [f"{name(rank)} has not moved for {seen[rank].still:.0f} s, {seen[rank].where}" for rank in ranks]
        more = f"; and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
        return HangDiagnosis(ranks, "; ".join(names[:_NAMED]) + more + f": {how}")

    if gone := those(lambda one: one.state == "gone"):
        names = [f"{name(rank)} has gone, last seen {seen[rank].where}" for rank in gone[:_NAMED]]
        return HangDiagnosis(gone, "; ".join(names))
    if stopped := those(lambda one: one.state == "stopped"):
        return diagnosis(stopped, "it is stopped (SIGSTOP)")
    if cut := those(lambda one: one.state == "cut"):
        return diagnosis(cut, "nothing is heard of it: its link is cut, or its host gone")
    if silent := those(lambda one: one.silent > limit / 2):
        return diagnosis(silent, "nothing is heard of it: its link is cut, its host gone, or the process stopped")
    if late := _late(seen):
        return diagnosis(late, "its Python stack is in its log")
    if busy := those(lambda one: one.position.phase not in WAITING and one.inside is None):
        return diagnosis(busy, "its Python stack is in its log")
    ranks_at = defaultdict(list)
    for rank, sighting in sorted(seen.items()):
        ranks_at[sighting.where].append(rank)
    if len(ranks_at) == 1:
        return diagnosis([max(seen, key=lambda rank: seen[rank].still)], "its Python stack is in its log")
    groups = [f"{', '.join(map(name, ranks))} {where}" for where, ranks in ranks_at.items()]
    return HangDiagnosis(
        those(lambda one: True),
        f"the ranks wait for each other in different collectives since {min(one.still for one in here):.0f} s: "
        + "; ".join(groups[:_NAMED])
        + ": their Python stacks are in their logs",
    )


def _limit(seen: Mapping[int, RankState], timeout: float) -> float:
    """Seconds without progress that are too many: more than `timeout` only while somebody may be at work."""
    ones = list(seen.values())
    if any(one.state in ("gone", "cut") for one in ones):
        return min(timeout, TIMEOUT_AFTER_LOSS)
    if any(one.state == "stopped" or one.silent > timeout / 2 for one in ones):
        return timeout
    if all(one.waited + one.silent >= timeout for one in ones):
        return timeout  # nobody is at work
    if all(one.position.begun < 2 for one in ones) or any(
        one.position.phase in _LONG and one.inside is None for one in ones
    ):
        return _EASE * timeout
    return max(timeout, _SLOWER * max(one.position.longest for one in ones))


def _late(seen: Mapping[int, RankState]) -> list[int]:
    """Ranks that have called fewer collectives than others of a group, and in no group more than others."""
    groups: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, sighting in seen.items():
        for group, number in sighting.calls.items():
            groups[group][rank] = number
    late = {rank for calls in groups.values() for rank in calls if calls[rank] < max(calls.values())}
    early = {rank for calls in groups.values() for rank in calls if calls[rank] > min(calls.values())}
    return sorted(late - early)
