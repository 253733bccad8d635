"""Dead experts and collapse are told, once, when they last; a balanced router is never accused."""

from __future__ import annotations

from moe_dist.monitor.expert_stats import layer_record
from moe_dist.monitor.health import Health
from moe_dist.monitor.records import LayerRecord


def interval(layer: int, load: list[int]) -> LayerRecord:
    return layer_record(layer, load, 0, sum(load) // 2, [0.0] * 5, 2)


def test_a_dead_expert_is_told_once_when_it_lasts() -> None:
    health = Health(patience=3)
    told = [health.observe([interval(4, [50, 50, 0, 60])]) for _ in range(6)]
    assert [len(sentences) for sentences in told] == [0, 0, 1, 0, 0, 0]
    assert told[2][0].words.startswith("layer 4: 1 of 4 experts get no tokens (2);")
    assert "balance.router_aux_loss_coef" in told[2][0].words
    assert (told[2][0].kind, told[2][0].layer, told[2][0].experts) == ("dead_experts", 4, (2,))


def test_a_recovered_expert_may_be_told_again() -> None:
    health = Health(patience=2)
    loads = [[1, 0], [1, 0], [1, 1], [1, 0], [1, 0]]
    assert [bool(health.observe([interval(0, load)])) for load in loads] == [False, True, False, False, True]


def test_collapse_is_told_per_layer() -> None:
    """Eight layers collapsed onto different pairs look balanced when pooled; each is told."""
    health = Health(patience=1)
    layers = []
    for layer in range(8):
        load = [1] * 16
        load[2 * layer] = load[2 * layer + 1] = 1000
        layers.append(interval(layer, load))
    told = health.observe(layers)
    assert len(told) == 8
    assert all("collapsed" in finding.words and "99 %" in finding.words for finding in told)
    assert [finding.experts for finding in told] == [(2 * layer, 2 * layer + 1) for layer in range(8)]


def test_a_balanced_or_empty_layer_is_never_accused() -> None:
    health = Health(patience=1)
    assert health.observe([interval(0, [100, 90, 110, 95]), interval(1, [0, 0, 0, 0])]) == []
