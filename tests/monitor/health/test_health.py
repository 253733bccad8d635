"""Dead experts and collapse are told, once, when they last; a balanced router is never accused."""

from __future__ import annotations

import statistics

import numpy as np

from moe_dist.config import BalanceConfig
from moe_dist.monitor.expert_stats import layer_record
from moe_dist.monitor.health.actions import Policy, levers
from moe_dist.monitor.health.rules import Health
from moe_dist.monitor.records import LayerRecord


def interval(layer: int, load: list[int]) -> LayerRecord:
    return layer_record(layer, load, 0, sum(load) // 2, {}, 2)


def test_a_dead_expert_is_told_once_when_it_lasts() -> None:
    health = Health(patience=3)
    told = [health.observe([interval(4, [50, 50, 0, 60])]) for _ in range(6)]
    assert [len(sentences) for sentences in told] == [0, 0, 1, 0, 0, 0]
    assert told[2][0].words.startswith("layer 4: 1 of 4 experts get no tokens (2);")
    assert "balance.router_aux_loss_coef" in told[2][0].words
    assert (told[2][0].kind, told[2][0].layer, told[2][0].experts) == ("dead_experts", 4, (2,))


def test_a_recovered_expert_may_be_told_again() -> None:
    health = Health(patience=2)
    loads = [[100, 0], [100, 0], [100, 1], [100, 0], [100, 0]]
    assert [bool(health.observe([interval(0, load)])) for load in loads] == [False, True, False, False, True]


def test_short_intervals_are_no_reason_to_be_quick() -> None:
    """Logged at every step, a trouble lasts 20 of them before it is told. Seen to fail with STEPS = 1: at step 3."""
    health = Health()
    told = [step for step in range(1, 41) if health.observe([interval(0, [5000, 5000, *[0] * 6])], step)]
    assert told == [20]


def test_one_that_dies_later_is_told_too() -> None:
    """Seen to fail with a layer told once while any of its experts is dead."""
    health = Health()
    early, late = [50, 50, 0, 60, 50, 50], [50, 0, 0, 60, 50, 50]
    loads = [early] * 5 + [late] * 5 + [early] * 5
    told = [
        (number, one.experts) for number, load in enumerate(loads, 1) for one in health.observe([interval(0, load)])
    ]
    assert told == [(3, (2,)), (8, (1, 2))]


def test_chance_kills_nobody() -> None:
    """A balanced layer whose intervals are short: each leaves two or three of 128 experts without a token, others every
    time. Seen to fail with `ENOUGH = 0`, after 1,955 intervals.
    """
    source = np.random.default_rng(0)
    loads = source.multinomial(512, [1 / 128] * 128, size=4000).tolist()
    assert statistics.mean(load.count(0) for load in loads) > 2
    health = Health()
    balance = BalanceConfig(act="on", bias_update_rate=1e-3)
    policy = Policy(levers(balance), [0], 2, 4, True)
    for step, load in enumerate(loads):
        assert health.observe([interval(0, load)]) == []
        policy.add({0: load})
        assert policy.decide(step) == []
    loads = [[0, *load[1:]] for load in loads[:12]]
    found = [number for number, load in enumerate(loads, 1) if health.observe([interval(0, load)])]
    assert found == [9]  # 8 x 512 x 127 / 128 pairs are not yet 32 x 128


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
