"""Which rank of an expert group holds which expert, and which other order would pay for the move.

A layer has as many slots as experts, and rank r of its group has the r-th block of them. `slots` (E,) says for each
slot which expert is in it; in the order of their ids, `range(E)`, experts are at home.

Shape suffixes: E experts, e = E / ep of them on a rank, S slots, R ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BETWEEN_HOSTS = 8
"""A byte from host to host takes as long as so many inside one."""


@dataclass(frozen=True)
class Cost:
    """What is weighed before experts change places, for one layer.

    `row_bytes` of one row on all its ways in a step: to its expert and home, forward and backward. `expert_bytes` of
    one expert with all its state, as it lies on one rank. `steps` until experts may move again. `ranks_per_host`:
    neighbouring ranks of the group on one host; None: all of them.
    """

    row_bytes: float
    expert_bytes: float
    steps: int
    ranks_per_host: int | None = None

    def rows(self, rank: int, num_ranks: int) -> Tensor:
        """(R,): rows a step that `rank` must spare by exchanging an expert with each of the ranks."""
        host = torch.arange(num_ranks).div(self.ranks_per_host or num_ranks, rounding_mode="floor")
        ways = torch.where(host == host[rank], 1.0, BETWEEN_HOSTS).double()
        return ways * (self.expert_bytes / (self.row_bytes * self.steps))


def hottest(load_E: Tensor, number: int) -> list[int]:
    """Up to so many experts that have most rows, those of equal ones with the lowest ids; none without a row."""
    order = load_E.sort(descending=True, stable=True).indices[:number].tolist()
    return [expert for expert in order if load_E[expert] > 0]


def rank_loads(load_E: Tensor, slots: Sequence[int], num_ranks: int, copied: Sequence[int] = ()) -> Tensor:
    """Rows of each rank, (R,). Of `copied` experts each has those of its own tokens, here as many as the others."""
    travels_E = load_E.clone()
    travels_E[list(copied)] = 0
    stays = (load_E.sum() - travels_E.sum()) / num_ranks
    return travels_E[list(slots)].view(num_ranks, -1).sum(1) + stays


def tax(load_E: Tensor, slots: Sequence[int], num_ranks: int, copied: Sequence[int] = ()) -> float:
    """Rows of the busiest rank / mean of ranks: in a layer all wait for that one. 1.0: balanced, or nothing to do."""
    load_R = rank_loads(load_E, slots, num_ranks, copied)
    total = float(load_R.sum())
    return float(load_R.max()) * num_ranks / total if total else 1.0


def better_slots(load_E: Tensor, slots: Sequence[int], num_ranks: int, cost: Cost) -> list[int]:
    """`slots` after exchanges of two experts each, of the busiest rank and of another, as long as one pays.

    `load_E` (E,): rows of every expert to be expected in a step. An exchange pays when the busier of the two ranks
    spares more bytes of rows, until experts may move again, than it sends of the expert. Of those the one is made that
    spares most. The same on every rank that has the same numbers.
    """
    load_E, found = load_E.double(), torch.tensor(slots)
    share = len(found) // num_ranks
    rank_S = torch.arange(len(found)).div(share, rounding_mode="floor")
    for _ in range(len(found)):
        load_S = load_E[found]
        load_R = load_S.view(num_ranks, share).sum(1)
        busiest = int(load_R.argmax())
        first = busiest * share
        shift_eS = load_S[first : first + share, None] - load_S[None, :]
        after_eS = torch.maximum(load_R[busiest] - shift_eS, load_R[rank_S] + shift_eS)
        spared_eS = load_R[busiest] - after_eS - cost.rows(busiest, num_ranks)[rank_S]
        spared_eS[:, first : first + share] = 0.0
        best = int(spared_eS.argmax())
        if spared_eS.flatten()[best] <= 0:
            break
        here, there = first + best // len(found), best % len(found)
        found[[here, there]] = found[[there, here]]
    return found.tolist()


@dataclass(frozen=True)
class Exchange:
    """The experts that change places, as one rank sees it.

    `leaving`: places here, in the order of the ranks they go to, `send_splits` to each; `arriving` and `receive_splits`
    likewise. A place may be in both.
    """

    leaving: list[int]
    send_splits: list[int]
    arriving: list[int]
    receive_splits: list[int]

    @classmethod
    def between(cls, before: Sequence[int], after: Sequence[int], rank: int, num_ranks: int) -> Exchange:
        share = len(before) // num_ranks
        slot_of = {expert: slot for slot, expert in enumerate(before)}
        moved = [(slot_of[expert], slot) for slot, expert in enumerate(after) if before[slot] != expert]
        leaving = [(to // share, source % share) for source, to in moved if source // share == rank]
        # Stable: what comes from one rank comes in the order of the places it goes to, as it was sent.
        arriving = sorted(((source // share, to % share) for source, to in moved if to // share == rank), key=_rank_of)
        return cls(
            [place for _, place in leaving],
            [sum(peer == other for other, _ in leaving) for peer in range(num_ranks)],
            [place for _, place in arriving],
            [sum(peer == other for other, _ in arriving) for peer in range(num_ranks)],
        )


def _rank_of(pair: tuple[int, int]) -> int:
    return pair[0]
