"""Every layout computes the same gradients, norm, weights and router bias as one process.

Reference: one process, fp32, all micro-batches of the global batch accumulated. The global batches have uneven valid
labels, padding, packed documents and a micro-batch without a single token. Compared: every gradient before clipping,
the global norm, weights after three AdamW steps, the selection bias, initial weights. Tolerance 1e-5 relative (L2).

Every test of a trap was seen to fail: `tests/verify` plants the bugs of `moe_dist/verify/injected_bugs/` one by one in
the very function that is compared here and demands that the comparison goes red.
"""

from __future__ import annotations

import pytest
import torch
from parity import TOLERANCE, compare
from ranks import run_ranks

from moe_dist.verify.trial import Trial, difference

pytestmark = pytest.mark.dist

SCOPES = ("micro_batch", "sequence", "global_batch")


@pytest.mark.parametrize("num_micro_batches", [4, 8], ids=["plain", "accumulated"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_layouts_agree_with_one_process(ep_size: int, scope: str, num_micro_batches: int) -> None:
    """Traps 1, 2, 3, 7, 10, 11, 14, 24: ep x edp in {1x4, 2x2, 4x1}, with and without accumulation."""
    worst = compare((f"balance.aux_loss_scope={scope}",), ep_size, num_micro_batches)
    assert worst["initial"] == 0.0
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize(
    "overrides",
    [
        ("balance.capacity_factor=0.8",),  # trap 20: the same tokens are dropped at every ep
        ("model.scoring_func=sigmoid", "model.n_group=4", "model.topk_group=2"),
        ("optimizer.optim=sgd", "optimizer.momentum=0.9"),
        ("optimizer.optim=adafactor",),
        ("train.gradient_checkpointing=full",),
        ("train.gradient_checkpointing=selective", "balance.aux_loss_scope=global_batch"),
        ("model.expert=swiglu_loop", "model.tie_word_embeddings=true"),
        ("balance.router_jitter=0.1",),  # noise belongs to the micro-batch, not to the rank
        ("balance.freeze_router=true", "train.label_smoothing_factor=0.1"),
    ],
    ids=lambda overrides: "+".join(item.split(".")[1] for item in overrides),
)
def test_options_agree_with_one_process(overrides: tuple[str, ...]) -> None:
    worst = compare(overrides, 2, 8)
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("scope", SCOPES)
def test_auxiliary_loss_alone(scope: str) -> None:
    """Trap 10: with labels that all are ignored, only the auxiliary losses give gradients."""
    overrides = (f"balance.aux_loss_scope={scope}", "balance.router_z_loss_coef=0")
    wanted = without_labels(overrides, 1, 8)
    for found in run_ranks(without_labels, 4, overrides, 2, 8):
        assert difference(found, wanted) < TOLERANCE
    routers = [value for name, value in wanted.items() if "router" in name]
    assert all(router.abs().max() > 1e-6 for router in routers)


def without_labels(overrides: tuple[str, ...], ep_size: int, num_micro_batches: int) -> dict[str, torch.Tensor]:
    from dataclasses import replace

    from tiny import mesh_of, micro_batches, tiny_config

    trial = Trial(tiny_config(f"parallel.ep_size={ep_size}", *overrides), mesh_of(ep_size))
    mine = trial.share(micro_batches(num_micro_batches))
    mine = [replace(batch, labels=torch.full_like(batch.labels, -100), num_valid=0) for batch in mine]
    with trial.unclipped() as gradients:
        trial.step(mine, 0, 0.0)
    return gradients
