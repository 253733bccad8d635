"""Numbers about load, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_dist.models.auxiliary import ROUTER_SUMS
from moe_dist.monitor.expert_stats import extremes, layer_record, load_ratios, overall
from moe_dist.monitor.records import LayerRecord


def sums(*values: float) -> dict[str, float]:
    return dict(zip(ROUTER_SUMS, values, strict=True))


def record(pairs: list[int], tokens: int | None = None, dropped: int = 0, layer: int = 0) -> LayerRecord:
    return layer_record(layer, pairs, dropped, sum(pairs) // 2 if tokens is None else tokens, {}, 2)


def test_balanced_load() -> None:
    got = record([10, 10, 10, 10])
    assert (got.load_imbalance, got.load_cv, got.load_entropy, got.dead_experts) == (1.0, 0.0, 1.0, 0)


def test_everything_on_one_expert() -> None:
    got = record([0, 40, 0, 0])
    assert (got.load_imbalance, got.load_entropy, got.dead_experts) == (4.0, 0.0, 3)
    assert got.load_cv == pytest.approx(math.sqrt(3))
    assert math.copysign(1, got.load_entropy) == 1.0


def test_known_values() -> None:
    got = layer_record(7, np.array([10, 20, 30, 40]), 5, 50, sums(55.0, 200.0, 60.0, 30.0, 450.0), top_k=2)
    assert got.layer == 7
    assert got.tokens_per_expert == [10, 20, 30, 40]
    assert all(type(count) is int for count in got.tokens_per_expert)
    assert got.load_imbalance == pytest.approx(1.6)
    assert got.load_cv == pytest.approx(math.sqrt(125) / 25)
    shares = (0.1, 0.2, 0.3, 0.4)
    assert got.load_entropy == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(4))
    assert got.dropped_fraction == pytest.approx(0.05)
    assert (got.aux_loss, got.z_loss, got.router_entropy, got.router_confidence) == pytest.approx((1.1, 4.0, 1.2, 0.6))
    assert got.router_logits_rms == pytest.approx(3.0)


def test_no_tokens_divides_nothing_by_zero() -> None:
    with np.errstate(all="raise"):
        got = layer_record(0, [0, 0, 0], 0, 0, {}, 2)
    assert got.dead_experts == 3
    numbers = (got.load_imbalance, got.load_cv, got.load_entropy, got.dropped_fraction, got.aux_loss)
    assert numbers == (0.0, 0.0, 0.0, 0.0, 0.0)
    assert load_ratios(got) == [0.0, 0.0, 0.0]


def test_one_expert_is_uniform() -> None:
    assert record([8]).load_entropy == 1.0


def test_nan_of_the_router_stays_in_its_field() -> None:
    got = layer_record(0, [4, 4], 0, 4, sums(math.nan, 4.0, 8.0, 2.0, math.nan), 2)
    assert math.isnan(got.aux_loss)
    assert math.isnan(got.router_logits_rms)
    assert (got.z_loss, got.router_entropy, got.load_imbalance) == (1.0, 2.0, 1.0)


def test_extremes_over_layers_of_different_load() -> None:
    # Layer 5 has few tokens: its expert 1 is hotter than any in layer 2, in shares though not in counts.
    layers = [record([100, 150, 120, 30], layer=2), record([1, 7, 0, 0], layer=5), record([0] * 4, layer=9)]
    hot, cold = extremes(layers) or pytest.fail("no extremes")
    assert hot == (5, 1, 3.5)
    assert cold == (5, 2, 0.0)


def test_extremes_without_any_token() -> None:
    assert extremes([]) is None
    assert extremes([record([0, 0])]) is None


def test_overall_means_and_the_sum_of_dead_experts() -> None:
    got = overall([record([10, 10]), record([20, 0])])
    assert got["load_imbalance"] == 1.5
    assert got["dead_experts"] == 1
    assert overall([]) == {}


def test_copied_experts_are_work_of_all_ranks() -> None:
    """Seen to fail with the tokens of a copied expert counted where it is, and with the slots forgotten."""
    in_order, copied = (layer_record(0, [10, 0, 4, 2], 0, 8, {}, 2, 2, copied=which) for which in ((), (0,)))
    assert (in_order.rank_imbalance, in_order.copied_experts) == (10 / 8, [])
    assert (copied.rank_imbalance, copied.rank_imbalance_in_order, copied.copied_experts) == (11 / 8, 10 / 8, [0])
    assert copied.tokens_per_expert == [10, 0, 4, 2]
    placed = layer_record(0, [10, 0, 4, 2], 0, 8, {}, 2, 2, slots=[0, 2, 1, 3], copied=(0,))
    assert placed.rank_imbalance == 9 / 8
