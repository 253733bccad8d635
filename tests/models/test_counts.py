"""Parameter and operation counts against published figures and against each other."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import ModelConfig, load_config
from moe_dist.models.counts import (
    fairest_split,
    flops_per_token,
    matmul_parameters,
    parameter_counts,
    per_rank,
    split_layers,
)
from moe_dist.parallel.layout import Layout

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = {
    "qwen3_30b_a3b": (30.53, 3.35),
    "qwen3_235b_a22b": (235.09, 22.19),
    "qwen3_coder_480b_a35b": (480.15, 35.47),
    "mixtral_8x7b": (46.70, 12.88),
    "mixtral_8x22b": (140.62, 39.15),
}
SMALL = st.builds(
    ModelConfig,
    vocab_size=st.integers(1, 300),
    hidden_size=st.sampled_from([16, 48]),
    num_hidden_layers=st.integers(1, 6),
    num_attention_heads=st.just(4),
    num_key_value_heads=st.sampled_from([None, 1, 2]),
    head_dim=st.sampled_from([None, 6]),
    num_experts=st.sampled_from([0, 4, 8]),
    decoder_sparse_step=st.integers(1, 3),
    shared_expert_intermediate_size=st.sampled_from([0, 24]),
    qk_norm=st.booleans(),
    attention_bias=st.booleans(),
    tie_word_embeddings=st.booleans(),
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str) -> None:
    counts = parameter_counts(load_config(CONFIGS / f"{name}.yaml").model)
    total, active = PUBLISHED[name]
    assert counts.total / 1e9 == pytest.approx(total, rel=5e-4)
    assert counts.active / 1e9 == pytest.approx(active, rel=2e-3)


def test_the_sizes_the_run_files_promise() -> None:
    billions = {
        name: parameter_counts(load_config(CONFIGS / f"{name}.yaml").model).total / 1e9
        for name in ("demo", "moe_16x", "moe_32x", "moe_64x")
    }
    assert billions == pytest.approx({"demo": 0.005, "moe_16x": 0.06, "moe_32x": 1.7, "moe_64x": 6.6}, rel=0.05)


def test_a_model_counted_by_hand() -> None:
    model = ModelConfig(
        vocab_size=10,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=5,
        moe_intermediate_size=3,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
        shared_expert_intermediate_size=7,
        attention_bias=True,
    )
    counts = parameter_counts(model)
    assert (counts.embedding, counts.head) == (80, 80)
    assert counts.attention == 2 * (64 + 64 + 32 + 32 + 8 + 4 + 4 + 8)
    assert (counts.per_expert, counts.experts, counts.active_experts) == (72, 288, 144)
    assert (counts.shared_experts, counts.router, counts.dense_mlp) == (168, 32, 120)
    assert counts.norms == 2 * (8 + 8 + 4 + 4) + 8
    assert counts.total - counts.active == 144
    weights = 2 * (64 + 64 + 32 + 32) + 144 + 168 + 32 + 120 + 80
    assert matmul_parameters(model) == weights
    assert flops_per_token(model, 100) == 6 * weights + 12 * 2 * 8 * 100


@given(SMALL, st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_ranks_add_up_to_the_model(model: ModelConfig, ep_size: int, pp_size: int) -> None:
    counts = parameter_counts(model)
    if pp_size > model.num_hidden_layers:
        with pytest.raises(ValueError, match="at most num_hidden_layers"):
            per_rank(model, Layout(pp_size, pp_size))
        return
    stages = per_rank(model, Layout(pp_size * ep_size, pp_size, ep_size))
    twice = counts.embedding if model.tie_word_embeddings and pp_size > 1 else 0
    assert sum(stage.dense for stage in stages) == counts.dense + twice
    assert sum(stage.experts for stage in stages) * ep_size == counts.experts
    assert [layer for stage in stages for layer in stage.layers] == list(range(model.num_hidden_layers))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7), st.data())
def test_no_other_split_is_fairer(layers: list[tuple[int, int]], data: st.DataObject) -> None:
    """Against all splits there are."""
    num_stages = data.draw(st.integers(1, len(layers)))
    times, sizes = (list(values) for values in zip(*layers, strict=True))
    splits = []
    for cuts in itertools.combinations(range(1, len(layers)), num_stages - 1):
        edges = (0, *cuts, len(layers))
        splits.append([range(start, end) for start, end in itertools.pairwise(edges)])

    def cost(split: list[range]) -> tuple[int, int]:
        return tuple(max(sum(values[i] for i in stage) for stage in split) for values in (times, sizes))  # type: ignore

    slowest = min(cost(split)[0] for split in splits)
    found, largest = fairest_split(sizes, times, slowest, num_stages)
    assert found in splits
    assert cost(found) == min(map(cost, splits))
    assert largest == cost(found)[1]


def test_stages_of_models_that_are_known() -> None:
    qwen = load_config(CONFIGS / "qwen3_30b_a3b.yaml").model
    # The head multiplies as many weights as five of its layers.
    assert [len(layers) for layers in split_layers(qwen, 4)] == [13, 14, 14, 7]
    small = ModelConfig(vocab_size=1, num_hidden_layers=8, mlp_only_layers=[0, 1], intermediate_size=512 * 8)
    assert [len(layers) for layers in split_layers(small, 1)] == [8]
    with pytest.raises(ValueError, match="pp_size=9: at most num_hidden_layers=8"):
        split_layers(small, 9)


@given(SMALL)
def test_a_token_uses_at_most_the_whole_model(model: ModelConfig) -> None:
    counts = parameter_counts(model)
    assert counts.active <= counts.total
    assert (counts.active == counts.total) == (not model.moe_layers)
    assert matmul_parameters(model) < counts.active + counts.embedding
    assert flops_per_token(model, 64) > 6 * matmul_parameters(model)


def test_experts_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="ep_size=3: must divide num_experts=16"):
        per_rank(ModelConfig(), Layout(3, ep_size=3))
