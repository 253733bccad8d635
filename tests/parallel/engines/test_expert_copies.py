"""Hot experts computed by every rank for its own tokens: the training is the same, to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import compare, on_layout, passes
from ranks import run_ranks
from tiny import micro_batches

from moe_dist.models.precision import in_dtype
from moe_dist.verify.trial import Trial, difference

pytestmark = pytest.mark.dist
TINY = 1e-10
"""Relative, in float64: a sum in another order, and nothing else."""
HOT = {1: [{0: [0], 2: [7]}, {0: [5], 2: [7]}, {2: [3]}], 2: [{0: [0, 7], 2: [2, 3]}, {0: [7, 0]}, {0: [4, 1]}]}
"""By number of copies: the experts of each step, by layer; of several owners, of one, and none."""
IDLE = [0, 7]


def trained(
    overrides: tuple[str, ...], ep_size: int, number: int, idle: bool
) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    """Losses and gradients of three steps, and the logical weights at the end. `idle`: no token chooses 0 and 7."""
    with in_dtype(torch.float64):
        config, mesh = on_layout((*overrides, f"parallel.replicated_experts={number}"), ep_size, 4)
        trial = Trial(config, mesh)
        if idle:
            for moe in trial.model.moe_layers():
                moe.router.bias_E[IDLE] = -1e6
        losses, gradients = [], {}
        for step in range(3):
            if number:
                trial.placing.copy(HOT[number][step])
            with trial.unclipped() as seen:
                losses.append(trial.step(trial.share(micro_batches(4, step)), step, 1e-2).loss)
            gradients |= {f"{step}.{name}": tensor for name, tensor in seen.items()}
            assert bool(trial.balancer.global_pairs()[:, IDLE].sum()) is not idle
        return losses, gradients, trial.weights


@pytest.mark.parametrize(
    ("ep_size", "number", "idle", "overrides"),
    [
        (4, 1, False, ("parallel.dispatcher=all_to_all",)),
        (4, 2, True, ()),
        (2, 2, True, ("parallel.dispatcher=all_to_all", "balance.capacity_factor=0.8")),
        (2, 1, False, ("parallel.zero_stage=1", "train.gradient_checkpointing=full", "parallel.dispatch_chunks=2")),
    ],
)
def test_losses_gradients_and_weights_are_as_without(
    ep_size: int, number: int, idle: bool, overrides: tuple[str, ...]
) -> None:
    """Seen to fail with gradients of copies counted twice, and with their tokens sent to the owners too."""
    without = run_ranks(trained, 4, overrides, ep_size, 0, idle)
    found = run_ranks(trained, 4, overrides, ep_size, number, idle)
    for (losses, *tensors), (losses_found, *tensors_found) in zip(without, found, strict=True):
        assert losses_found == pytest.approx(losses, rel=TINY)
        for mine, wanted in zip(tensors_found, tensors, strict=True):
            assert difference(mine, wanted) < TINY


@pytest.mark.parametrize(
    ("ep_size", "pp_size", "count", "overrides"),
    [
        (2, 1, 8, ("parallel.zero_stage=2",)),
        (2, 1, 8, ("parallel.zero_stage=3", "train.gradient_checkpointing=full")),
        (4, 1, 4, ("parallel.expert_placement=balanced", "parallel.dispatcher=dedup", "model.num_experts_per_tok=4")),
        (2, 2, 4, ("train.gradient_checkpointing=full",)),
        (2, 1, 4, ("train.bf16=true",)),
        (2, 1, 4, ("train.pure_bf16=true",)),
    ],
)
def test_it_is_what_one_process_computes(ep_size: int, pp_size: int, count: int, overrides: tuple[str, ...]) -> None:
    """With copies of other experts after each step, in half precision too."""
    worst = compare(("parallel.replicated_experts=2", *overrides), ep_size, count, pp_size)
    half = any("bf16" in text for text in overrides)
    assert worst["losses"] < 0.02 if half else passes(worst), worst
