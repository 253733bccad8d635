"""Sharded data parallelism computes what one process computes: every stage, with experts, recomputation, hybrids."""

from __future__ import annotations

import pytest
from parity import compare

from moe_dist.verify.trial import TOLERANCE

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_stages_agree_with_one_process(zero_stage: int, ep_size: int) -> None:
    """Trap 8: reductions are sums; with FSDP's own averaging experts come out wrong.

    Seen to fail without `set_gradient_divide_factor(1.0)`.
    """
    worst = compare((f"parallel.zero_stage={zero_stage}",), ep_size, 8)
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_hybrid_sharding_agrees(zero_stage: int, ep_size: int) -> None:
    """Sharded over two replicas, replicated over two."""
    worst = compare((f"parallel.zero_stage={zero_stage}", "parallel.shard_size=2"), ep_size, 8)
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("option", ["train.gradient_checkpointing=full", "balance.aux_loss_scope=global_batch"])
def test_options_agree(option: str) -> None:
    worst = compare(("parallel.zero_stage=3", option), 2, 8)
    assert max(worst.values()) < TOLERANCE, worst
