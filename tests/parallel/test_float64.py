"""In float64 layouts agree to thirteen digits: what differs in float32 is rounding, not arithmetic.

Experts of a person's own class, 64 of them for a few hundred tokens, differ by up to 7e-5 in a gradient of the third
step in float32 (ep 2 against one process). So does one process in float32 from itself in float64, by 3e-5: gradients of
experts with a token or two are no larger than AdamW's epsilon, and AdamW divides by them.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from parity import told
from patches import replaced
from ranks import run_ranks

from moe_dist.models.experts import Expert
from moe_dist.models.precision import in_dtype
from moe_dist.parallel.engines.replicated import ReplicatedEngine
from moe_dist.verify.trial import TrialResult, deviations

COUNT = 8


class Own(Expert):
    """Nothing to compute without rows; its weights then have no gradient at all."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.up = torch.nn.Linear(hidden_size, intermediate_size)
        self.down = torch.nn.Linear(intermediate_size, hidden_size)

    def forward(self, x_RD: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x_RD).relu()) if len(x_RD) else x_RD


def told_in_float64(overrides: tuple[str, ...], ep_size: int, factor: float = 1.0) -> TrialResult:
    """`factor`: a bug so small that float32 would not show it, in the gradients of the experts."""
    norm = ReplicatedEngine.norm

    def wrong(self: ReplicatedEngine) -> torch.Tensor:
        self.experts.flat.mul_(factor)
        return norm(self)

    with in_dtype(torch.float64), replaced(ReplicatedEngine, "norm", wrong):
        return told(overrides, ep_size, COUNT)


@cache
def in_one_process(overrides: tuple[str, ...]) -> TrialResult:
    return told_in_float64(overrides, 1)


OWN = ("model.expert=test_float64:Own", "model.num_experts=64")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("overrides", "ep_size"),
    [(OWN, 2), (OWN, 4), (("model.expert=swiglu",), 2)],
    ids=["64 of one's own, ep 2", "64 of one's own, ep 4", "swiglu, ep 2"],
)
def test_layouts_agree_to_thirteen_digits(overrides: tuple[str, ...], ep_size: int) -> None:
    wanted = in_one_process(overrides)
    assert {gradient.dtype for gradient in wanted.gradients.values()} == {torch.float64}
    for found in run_ranks(told_in_float64, 4, overrides, ep_size):
        worst = deviations(found, wanted)
        assert max(worst.values()) < 1e-12, worst


@pytest.mark.dist
def test_a_bug_below_float32_is_seen() -> None:
    """The proof can fail: expert gradients too large by a hundred-millionth."""
    found = run_ranks(told_in_float64, 4, OWN, 2, 1 + 1e-8)[0]
    assert max(deviations(found, in_one_process(OWN)).values()) > 1e-10
