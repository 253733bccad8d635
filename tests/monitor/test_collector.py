"""The collector: exact sums, one reduction, reset."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.auxiliary import LoadFacts
from moe_dist.models.moe import MoE
from moe_dist.monitor.collector import Collector

CPU = torch.device("cpu")


def facts(pairs: list[int], dropped: int = 0, tokens: int = 0, sums: tuple[float, ...] = (0,) * 5) -> LoadFacts:
    made = LoadFacts.zeros(len(pairs), CPU)
    made.pairs_E += torch.tensor(pairs)
    made.dropped_E[0] += dropped
    made.tokens += tokens
    made.sums += torch.tensor(sums, dtype=torch.float64)
    made.fallbacks += tokens // 5
    return made


def test_sums_of_many_steps_are_exact() -> None:
    collector = Collector([0], 101, 2, CPU)
    step = list(range(600, 701))
    for _ in range(64):
        collector.add({0: facts(step, tokens=sum(step) // 2)})
    (record,) = collector.take()
    assert record.tokens_per_expert == [64 * count for count in step]


def test_large_counts_are_exact_over_ranks() -> None:
    odd = 2**50 + 1
    collector = Collector([0], 3, 1, CPU, reduce=lambda packed: packed * 7)
    collector.add({0: facts([odd, odd + 2, 1], tokens=odd)})
    (record,) = collector.take()
    assert record.tokens_per_expert == [7 * odd, 7 * (odd + 2), 7]


def test_one_reduction_of_one_tensor_and_reset() -> None:
    seen: list[Tensor] = []

    def doubled(packed: Tensor) -> Tensor:
        seen.append(packed)
        return packed.mul_(2)

    collector = Collector([1, 3], 4, 2, CPU, doubled)
    collector.add({1: facts([1, 2, 3, 4], 1, 5, (5, 10, 15, 1, 40)), 3: facts([4, 4, 1, 1], 0, 5)})
    collector.add({1: facts([1, 0, 0, 1], 1, 1, (1, 2, 3, 2, 14)), 3: facts([1, 1, 0, 0], 0, 1)})
    first, second = collector.take()
    assert len(seen) == 1
    assert seen[0].shape == (2 * (4 + 4 + 1 + 1 + 5),)
    assert (first.layer, second.layer) == (1, 3)
    assert first.tokens_per_expert == [4, 4, 6, 10]
    assert second.tokens_per_expert == [10, 10, 2, 2]
    assert first.dropped_fraction == pytest.approx(4 / 24)
    assert (first.fallback_tokens, second.fallback_tokens) == (2, 2)
    assert (first.kept_per_expert, second.kept_per_expert) == ([0, 4, 6, 10], [])
    assert (first.aux_loss, first.z_loss, first.router_entropy) == pytest.approx((1.0, 2.0, 3.0))
    assert first.router_confidence == pytest.approx(0.5)
    assert first.router_logits_rms == pytest.approx(3.0)
    assert [record.tokens_per_expert for record in collector.take()] == [[0] * 4, [0] * 4]


def test_layers_of_other_ranks_and_any_order() -> None:
    others = torch.zeros(3, 2 + 2 + 1 + 1 + 5, dtype=torch.float64)
    others[1] = torch.tensor([5, 7, 1, 0, 6, 0, 6.0, 0, 0, 0, 0])
    collector = Collector([0, 2, 4], 2, 2, CPU, reduce=lambda packed: packed + others.flatten())
    collector.add({4: facts([8, 0], tokens=4), 0: facts([3, 1], tokens=2)})
    assert [record.tokens_per_expert for record in collector.take()] == [[3, 1], [5, 7], [8, 0]]


def test_domains_are_counted_apart_in_the_same_reduction() -> None:
    """A layer of another rank, and one that counts no domain. Seen to fail with domains left out of the reset."""
    others = torch.zeros(2, 3 + 3 + 1 + 1 + 5 + 2 * 3, dtype=torch.float64)
    others[0, -6:] = torch.arange(6)
    collector = Collector([0, 4], 3, 1, CPU, reduce=lambda packed: packed + others.flatten(), num_domains=2)
    for _ in range(2):
        made = facts([5, 5, 2], tokens=12)
        made.pairs_NE = torch.tensor([[5, 0, 1], [0, 5, 2**40 + 1]])
        collector.add({4: made})
    first, second = collector.take()
    assert first.domain_tokens == [[0, 1, 2], [3, 4, 5]]
    assert second.domain_tokens == [[10, 0, 2], [0, 10, 2**41 + 2]]
    assert second.tokens_per_expert == [10, 10, 4]
    others.zero_()
    assert [record.domain_tokens for record in collector.take()] == [[[0] * 3] * 2] * 2


def test_unknown_layer_is_named() -> None:
    with pytest.raises(ValueError, match=r"layer 7: not one of the expert layers \[0, 2\]"):
        Collector([0, 2], 2, 2, CPU).add({7: facts([1, 1])})


def test_dense_model_reduces_nothing() -> None:
    collector = Collector([], 0, 2, CPU, reduce=lambda packed: pytest.fail("no reduction expected"))
    collector.add({})
    assert collector.take() == []


def test_facts_of_a_real_layer() -> None:
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=16, num_attention_heads=2, moe_intermediate_size=16, num_experts=8)
    layer = MoE(config, BalanceConfig(capacity_factor=0.5), layer=2)
    layer.balance.facts = LoadFacts.zeros(8, CPU)
    collector = Collector([2], 8, 2, CPU)
    for _ in range(3):
        layer(torch.randn(2, 16, 16))
        collector.add({2: layer.balance.facts})
        layer.balance.facts.zero_()
    (record,) = collector.take()
    assert sum(record.tokens_per_expert) == 3 * 32 * 2
    assert 0 < record.dropped_fraction < 1
    places = 3 * math.ceil(0.5 * 32 * 2 / 8)
    assert all(0 < kept <= min(places, wanted) for kept, wanted in zip(
        record.kept_per_expert, record.tokens_per_expert, strict=True))  # fmt: skip
    assert sum(record.kept_per_expert) == pytest.approx(192 * (1 - record.dropped_fraction))
    assert record.aux_loss == pytest.approx(1.0, abs=0.5)
    assert 0 < record.router_entropy <= torch.log(torch.tensor(8.0)).item()
    assert 1 / 8 < record.router_confidence < 1
