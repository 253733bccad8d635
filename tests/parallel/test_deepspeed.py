"""The DeepSpeed engine computes what one process computes: ep x ZeRO stage, accumulation, offload, options."""

from __future__ import annotations

import json

import pytest
from parity import TOLERANCE, deviations, reference
from ranks import run_ranks
from tiny import train_and_tell

pytestmark = pytest.mark.dist


def compare(overrides: tuple[str, ...], ep_size: int, num_micro_batches: int, *engine: str) -> dict[str, float]:
    """Largest deviations of DeepSpeed on four ranks from our own engine in one process."""
    wanted = reference(overrides, num_micro_batches)
    overrides = (*overrides, "parallel.engine=deepspeed", *engine)
    worst: dict[str, float] = {}
    for found in run_ranks(train_and_tell, 4, overrides, ep_size, num_micro_batches):
        for key, value in deviations(found, wanted).items():
            worst[key] = max(worst.get(key, 0.0), value)
    return worst


@pytest.mark.parametrize("num_micro_batches", [4, 8], ids=["plain", "accumulated"])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_stages_agree_with_one_process(zero_stage: int, ep_size: int, num_micro_batches: int) -> None:
    worst = compare((), ep_size, num_micro_batches, f"parallel.zero_stage={zero_stage}")
    assert worst["initial"] == 0.0
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_offloaded_optimizers_agree(zero_stage: int, ep_size: int) -> None:
    """Gradients take another way through DeepSpeed: partitions of weights, gradients and state in host memory."""
    worst = compare((), ep_size, 8, f"parallel.zero_stage={zero_stage}", "parallel.offload_optimizer=cpu")
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.optim=sgd",),
        ("train.gradient_checkpointing=full",),
        ("train.gradient_checkpointing=selective", "balance.aux_loss_scope=global_batch"),
        ("model.expert=swiglu_loop", "model.tie_word_embeddings=true"),
        ("balance.freeze_router=true", "train.label_smoothing_factor=0.1"),
        ("balance.capacity_factor=0.8", "balance.router_jitter=0.1"),
        ("train.max_grad_norm=1000", "train.deterministic=true"),
    ],
    ids=lambda overrides: "+".join(item.split(".")[1] for item in overrides),
)
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_options_agree(zero_stage: int, overrides: tuple[str, ...]) -> None:
    worst = compare(overrides, 2, 8, f"parallel.zero_stage={zero_stage}")
    assert max(worst.values()) < TOLERANCE, worst


TUNED = {"zero_optimization": {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "overlap_comm": True}}
RANK_BY_RANK = {"zero_optimization": {"reduce_bucket_size": 3000, "use_multi_rank_bucket_allreduce": False}}


@pytest.mark.parametrize("tuning", [TUNED, RANK_BY_RANK], ids=["small buckets", "rank by rank"])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_tuning_by_a_file_of_ones_own_changes_nothing(zero_stage: int, tuning: dict) -> None:
    """Buckets smaller than most parameters, reductions beside backward, one reduction per owner."""
    worst = compare((), 2, 8, f"parallel.zero_stage={zero_stage}", f"parallel.deepspeed_config={json.dumps(tuning)}")
    assert max(worst.values()) < TOLERANCE, worst
