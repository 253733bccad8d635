"""Bugs in how experts change ranks and are copied: what is left behind."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from torch import Tensor

from moe_dist.parallel import expert_copies
from moe_dist.parallel.engines.expert_moves import ExpertPlacement, Slots
from moe_dist.verify.injected_bugs.planting import Replace


def moments_stay_when_experts_move(replace: Replace) -> None:
    """Weights change ranks, and are updated by the moments of the experts that were there before."""
    state = ExpertPlacement._state

    def wrong(self: ExpertPlacement) -> Any:
        with patch.object(self.engine, "named_state", lambda: iter(())):
            return state(self)

    replace(ExpertPlacement, "_state", wrong)


def noise_stays_when_experts_move(replace: Replace) -> None:
    """An expert draws the noise of the one that was in its place at the start."""
    move = ExpertPlacement.move

    def wrong(self: ExpertPlacement, slots: Slots) -> int:
        sent = move(self, slots)
        for moe in self.model.moe_layers():
            first = moe.experts.first_expert
            moe.experts.held = range(first, first + moe.experts.num_local)
        return sent

    replace(ExpertPlacement, "move", wrong)


def copies_learn_from_one_rank(replace: Replace) -> None:
    """Of the gradients that all ranks have sent for a hot expert only those of the first are taken."""

    def wrong(grads: Tensor, num_ranks: int) -> Tensor:
        return grads[: len(grads) // num_ranks]

    replace(expert_copies, "sum_over_ranks", wrong)
