"""Sharded data parallelism computes what one process computes: every stage, with experts, recomputation, hybrids."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from parity import compare
from ranks import run_ranks
from tiny import mesh_of, micro_batches, tiny_config

from moe_dist.verify.trial import TOLERANCE, Trial

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


def bytes_of_state(zero_stage: int, ep_size: int) -> tuple[int, int]:
    """Bytes of (weights, optimizer moments) on this rank, after a step."""
    from moe_dist.parallel.sharding import local

    config = tiny_config(f"parallel.ep_size={ep_size}", f"parallel.zero_stage={zero_stage}")
    parts = Trial(config, mesh_of(ep_size))
    parts.step(micro_batches(4)[dist.get_rank() :][:1], 0, 1e-2)
    weights = sum(local(p).numel() * p.element_size() for p in parts.model.parameters())
    moments = sum(t.numel() * t.element_size() for _, key, ts, _ in parts.optimizer.named_state() for t in ts if t.ndim)
    return weights, moments


@pytest.mark.parametrize("ep_size", [1, 2])
def test_memory_falls_with_the_number_of_replicas(ep_size: int) -> None:
    """Weights and moments on four ranks: a quarter of those of replicated dense parameters, whatever ep is."""
    replicated = run_ranks(bytes_of_state, 4, 0, ep_size)
    sharded = run_ranks(bytes_of_state, 4, 3, ep_size)
    whole_weights = run_ranks(bytes_of_state, 4, 0, 1)[0][0]
    for (weights, moments), (_, all_moments) in zip(sharded, replicated, strict=True):
        assert weights == pytest.approx(whole_weights / 4, rel=0.05)
        assert moments == pytest.approx(2 * weights, rel=0.05)
        assert moments < all_moments
