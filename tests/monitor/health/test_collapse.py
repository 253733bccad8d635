"""Eight layers, each collapsed onto a pair of experts of its own: perfect when pooled, and what we say instead."""

from __future__ import annotations

import pytest
import torch

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.auxiliary import LoadFacts
from moe_dist.models.moe import MoE
from moe_dist.monitor.collector import Collector
from moe_dist.monitor.expert_stats import layer_record, overall, used_share
from moe_dist.monitor.health.rules import Health, collapse_limit

LAYERS, EXPERTS, TOP_K, TOKENS, STEPS = 8, 16, 2, 128, 3


def collapsed_layer(number: int) -> MoE:
    """A real layer whose router gives nearly all of its probability to experts 2n and 2n + 1, for any token."""
    config = ModelConfig(
        hidden_size=16,
        num_attention_heads=2,
        moe_intermediate_size=16,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    layer = MoE(config, BalanceConfig(), layer=number)
    layer.balance.facts = LoadFacts.zeros(EXPERTS, torch.device("cpu"))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2 * number : 2 * number + 2, 0] = 20.0  # inputs have a 1 in front
    return layer


def test_collapse_that_pooling_hides_is_told_for_every_layer() -> None:
    """Facts of real layers, through the collector, to the diagnosis.

    Seen to fail with `Collector.add` putting every layer into the first row, and with `Health` looking at the sum
    of the layers.
    """
    torch.manual_seed(0)
    collector = Collector(range(LAYERS), EXPERTS, TOP_K, "cpu")
    layers = [collapsed_layer(number) for number in range(LAYERS)]
    for _ in range(STEPS):
        for layer in layers:
            x_BSD = torch.randn(1, TOKENS, 16)
            x_BSD[..., 0] = 1.0
            layer(x_BSD)
        collector.add({number: layer.balance.facts for number, layer in enumerate(layers)})
        for layer in layers:
            layer.balance.facts.zero_()
    records = collector.take()

    # What a trainer sees that adds the layers up before it looks: every expert exactly as busy as any other.
    pairs = [sum(counts) for counts in zip(*(record.tokens_per_expert for record in records), strict=True)]
    pooled = layer_record(0, pairs, 0, LAYERS * STEPS * TOKENS, {}, TOP_K)
    assert (pooled.load_imbalance, pooled.dead_experts, used_share(pooled)) == (1.0, 0, 1.0)
    assert Health(patience=1).observe([pooled]) == []

    # What we see: per layer, on a scale where 1.0 is balanced and E / K the worst.
    for number, record in enumerate(records):
        assert record.tokens_per_expert[2 * number : 2 * number + 2] == [STEPS * TOKENS] * 2
        assert record.aux_loss == pytest.approx(EXPERTS / TOP_K, rel=1e-3)
        assert record.load_imbalance == EXPERTS / TOP_K
        assert record.dead_experts == EXPERTS - TOP_K
        assert used_share(record) == pytest.approx(TOP_K / EXPERTS)
        assert used_share(record) < collapse_limit(record) == pytest.approx((TOP_K / EXPERTS) ** 0.5)
        assert record.router_confidence == pytest.approx(0.5, rel=1e-3)  # certain of the pair, torn between the two
    totals = overall(records)
    assert totals["aux_loss"] == pytest.approx(EXPERTS / TOP_K, rel=1e-3)
    assert totals["dead_experts"] == LAYERS * (EXPERTS - TOP_K)
    told = [str(finding) for finding in Health(patience=1).observe(records)]
    for number in range(LAYERS):
        assert len([text for text in told if text.startswith(f"layer {number}: the router has collapsed")]) == 1
        assert len([text for text in told if text.startswith(f"layer {number}: 14 of 16 experts get no tokens")]) == 1
    assert len(told) == 2 * LAYERS
