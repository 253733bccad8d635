"""Experts that change ranks between steps: the training is the same, number by number, as if they had stayed."""

from __future__ import annotations

import pytest
import torch
from parity import on_layout
from ranks import run_ranks
from tiny import micro_batches

from moe_dist.models.precision import in_dtype
from moe_dist.verify.trial import Trial

pytestmark = pytest.mark.dist
MOVED = "parallel.expert_placement=balanced"


def trained(overrides: tuple[str, ...], ep_size: int, moves: bool, dtype: torch.dtype) -> tuple[list[float], dict]:
    """Losses of four steps, and the logical weights at the end, with or without moves after each step."""
    with in_dtype(dtype):
        config, mesh = on_layout((MOVED, *overrides), ep_size, 4)
        trial = Trial(config, mesh)
        losses = []
        for step in range(4):
            losses.append(trial.step(trial.share(micro_batches(4, step)), step, 1e-2).loss)
            if moves:
                trial.placing.move_all()
        assert trial.placing.placement is not None
        away = trial.placing.slots != trial.placing.placement.home
        return [*losses, float(away)], trial.weights


EXACT = ("train.max_grad_norm=0", "parallel.dispatcher=all_to_all")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("ep_size", "overrides"),
    [
        (4, EXACT),
        (2, EXACT),
        (4, ("train.max_grad_norm=0", "parallel.dispatcher=all_gather")),
        (2, ("train.max_grad_norm=0", "parallel.dispatcher=dedup")),
        (2, (*EXACT, "parallel.zero_stage=1")),
        (2, (*EXACT, "parallel.zero_stage=3")),
        (4, (*EXACT, "optimizer.optim=adafactor")),
        (4, (*EXACT, "train.pure_bf16=true")),
    ],
)
def test_bits(ep_size: int, overrides: tuple[str, ...], dtype: torch.dtype) -> None:
    stayed = run_ranks(trained, 4, overrides, ep_size, False, dtype)
    moved = run_ranks(trained, 4, overrides, ep_size, True, dtype)
    for (losses, weights), (losses_moved, weights_moved) in zip(stayed, moved, strict=True):
        assert losses[:-1] == losses_moved[:-1]
        assert [losses[-1], losses_moved[-1]] == [0.0, 1.0]
        assert weights.keys() == weights_moved.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, weights_moved[name]), name
