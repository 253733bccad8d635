"""Which experts change places, and what a rank sends for it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from run_files import complaint
from torch import Tensor

from moe_dist.parallel.placement import BETWEEN_HOSTS, Cost, Exchange, better_slots, hottest, rank_loads, tax

FREE = Cost(row_bytes=1.0, expert_bytes=0.0, steps=1)


def loads(*counts: float) -> Tensor:
    return torch.tensor(counts, dtype=torch.float64)


def test_the_busiest_rank_gives_a_hot_expert_for_a_cold_one() -> None:
    load_E = loads(9, 7, 1, 1)
    assert tax(load_E, range(4), 2) == pytest.approx(16 / 9)
    slots = better_slots(load_E, range(4), 2, FREE)
    assert sorted(slots) == [0, 1, 2, 3]
    assert sorted(rank_loads(load_E, slots, 2).tolist()) == [8, 10]
    assert better_slots(load_E, slots, 2, FREE) == slots


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(16, 2), (64, 8), (128, 16)])
def test_it_never_gets_worse_and_comes_near_what_can_be(num_experts: int, num_ranks: int) -> None:
    """Zipf's loads: no rank can have less than the hottest expert and the coldest others."""
    for seed in range(5):
        order = random.Random(seed).sample(range(num_experts), num_experts)
        load_E = loads(*(1000.0 / (1 + rank) ** 0.7 for rank in order))
        slots = better_slots(load_E, range(num_experts), num_ranks, FREE)
        assert sorted(slots) == list(range(num_experts))
        share = num_experts // num_ranks
        ascending = load_E.sort().values
        least = max(float(ascending[-1] + ascending[: share - 1].sum()) * num_ranks / float(load_E.sum()), 1.0)
        before, after = tax(load_E, range(num_experts), num_ranks), tax(load_E, slots, num_ranks)
        assert after <= before
        assert after < 1.03 * least


def test_a_move_must_spare_more_than_it_costs() -> None:
    """The exchange spares 6 rows a step of 10 bytes: 60 bytes a step."""
    load_E = loads(9, 7, 1, 1)
    for expert_bytes, steps, moves in ((59.0, 1, True), (61.0, 1, False), (590.0, 10, True), (610.0, 10, False)):
        cost = Cost(10.0, expert_bytes, steps)
        assert (better_slots(load_E, range(4), 2, cost) != [0, 1, 2, 3]) is moves, (expert_bytes, steps)


def test_exchanges_inside_a_host_come_first() -> None:
    """Ranks 0 and 1 are one host: rank 1 is as idle as rank 2, and nearer."""
    load_E = loads(8, 8, 1, 1, 1, 1, 4, 4)
    near = better_slots(load_E, range(8), 4, Cost(1.0, 0.5, 1, ranks_per_host=2))
    assert {*near[:4]} == {0, 1, 2, 3}
    alone = loads(8, 8, 8, 8, 1, 1, 1, 1)  # nothing to gain inside
    cheap, dear = (Cost(1.0, size / BETWEEN_HOSTS, 1, ranks_per_host=2) for size in (6.9, 7.1))
    assert better_slots(alone, range(8), 4, cheap) != [*range(8)]
    assert better_slots(alone, range(8), 4, dear) == [*range(8)]


def test_without_a_row_nothing_moves() -> None:
    assert better_slots(loads(0, 0, 0, 0), range(4), 2, FREE) == [0, 1, 2, 3]
    assert tax(loads(0, 0, 0, 0), range(4), 2) == 1.0


def test_what_is_hottest_and_what_copies_of_it_spare() -> None:
    load_E = loads(9, 1, 7, 7)
    assert [hottest(load_E, number) for number in range(4)] == [[], [0], [0, 2], [0, 2, 3]]
    assert hottest(loads(0, 2, 0, 0), 3) == [1]
    assert rank_loads(load_E, [0, 2, 1, 3], 2, copied=[0]).tolist() == [4.5 + 7, 4.5 + 8]
    assert tax(load_E, [0, 2, 1, 3], 2, copied=[0, 1, 2, 3]) == 1.0
    assert load_E.tolist() == [9, 1, 7, 7]


def test_what_ranks_send_is_what_ranks_receive() -> None:
    """Every rank's exchange, carried out on lists of experts."""
    for seed in range(20):
        drawn = random.Random(seed)
        before, after = drawn.sample(range(12), 12), drawn.sample(range(12), 12)
        parts = [Exchange.between(before, after, rank, 3) for rank in range(3)]
        places = [before[4 * rank : 4 * rank + 4] for rank in range(3)]
        sent: dict[tuple[int, int], list[int]] = {}
        for rank, part in enumerate(parts):
            leaving = iter([places[rank][place] for place in part.leaving])
            for peer, count in enumerate(part.send_splits):
                sent[rank, peer] = [next(leaving) for _ in range(count)]
        for rank, part in enumerate(parts):
            came = [expert for peer in range(3) for expert in sent[peer, rank]]
            assert [len(sent[peer, rank]) for peer in range(3)] == part.receive_splits
            for place, expert in zip(part.arriving, came, strict=True):
                places[rank][place] = expert
        assert [expert for here in places for expert in here] == after


@pytest.mark.parametrize(
    ("rest", "named"),
    [
        ("parallel: {expert_placement: balanced, ep_size: 2, engine: deepspeed, zero_stage: 1}", "engine=deepspeed"),
        ("parallel: {expert_placement: balanced}\ntrain: {freeze: ['experts:0']}", "train.freeze=experts:0"),
        ("parallel: {expert_placement: balanced}\nlora: {r: 4, quantize: nf4}", "lora.quantize=nf4"),
    ],
)
def test_what_cannot_move_is_refused_by_name(tmp_path: Path, rest: str, named: str) -> None:
    said = complaint(tmp_path, f"{rest}\n")
    assert "parallel.expert_placement=balanced" in said
    assert named in said


@pytest.mark.parametrize(
    ("rest", "named"),
    [
        ("model: {num_experts: 2}\nparallel: {replicated_experts: 2}", "model.num_experts=2"),
        ("parallel: {replicated_experts: 2, ep_size: 2, engine: deepspeed, zero_stage: 1}", "engine=deepspeed"),
        ("model: {expert: swiglu_clamped}\nparallel: {replicated_experts: 2}", "model.expert=swiglu_clamped"),
        ("parallel: {replicated_experts: 2}\nlora: {r: 4, target_modules: all-linear}", "lora.target_modules"),
        ("parallel: {replicated_experts: 2}\nlora: {r: 4, target_modules: [q_proj], quantize: nf4}", "quantize=nf4"),
        (
            "parallel: {replicated_experts: 2, pp_size: 2, schedule: zero_bubble}\n"
            "train: {gradient_accumulation_steps: 4}",
            "schedule=zero_bubble",
        ),
    ],
)
def test_experts_that_cannot_be_copied_are_refused_by_name(tmp_path: Path, rest: str, named: str) -> None:
    said = complaint(tmp_path, f"{rest}\n")
    assert "parallel.replicated_experts=2" in said
    assert named in said
