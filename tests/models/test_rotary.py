"""Stretched rotary positions beside those of `transformers`, and the windows of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import Glm4MoeConfig, Qwen3MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from moe_dist.config import ModelConfig
from moe_dist.models.rotary import rotary_table, score_factor
from moe_dist.models.transformer import Transformer

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn of gpt-oss": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "yarn of DeepSeek": {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "beta_fast": 16,
        "original_max_position_embeddings": 128,
    },
    "yarn, its factor given": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
        "long_factor": [1.0 + 0.5 * pair for pair in range(8)],
    },
    "longrope, its factor the ratio of lengths": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [16, 200])
def test_as_transformers_has_it(name: str, length: int) -> None:
    """The factor of `dynamic` counts past max_position_embeddings only."""
    scaling, theta = SCALINGS[name], 10000.0
    config = ModelConfig(head_dim=16, rope_theta=theta, max_position_embeddings=256, rope_scaling=scaling)
    theirs = Qwen3MoeConfig(
        head_dim=16, max_position_embeddings=256, rope_parameters=dict(scaling) | {"rope_theta": theta}
    )
    positions = torch.arange(length)[None]
    expected = Qwen3MoeRotaryEmbedding(theirs)(torch.zeros(1), positions)
    torch.testing.assert_close(rotary_table(positions, config), tuple(expected), rtol=1e-5, atol=2e-5)


def test_half_of_a_head_is_turned() -> None:
    config = ModelConfig(head_dim=16, partial_rotary_factor=0.5)
    theirs = Glm4MoeConfig(head_dim=16, partial_rotary_factor=0.5, rope_parameters={"rope_theta": 10000.0})
    positions = torch.arange(40)[None]
    expected = Glm4MoeRotaryEmbedding(theirs)(torch.zeros(1), positions)
    assert expected[0].shape[-1] == 8
    torch.testing.assert_close(rotary_table(positions, config), tuple(expected))


def test_longrope_looks_at_each_row_for_itself() -> None:
    """Else what a row's loss is would depend on its neighbours in the batch, which depend on the layout of ranks."""
    config = ModelConfig(head_dim=16, max_position_embeddings=256, rope_scaling=SCALINGS["longrope"])
    short, long = torch.arange(32), torch.arange(1, 33)
    together = rotary_table(torch.stack((short, long)), config)[0]
    torch.testing.assert_close(together[0], rotary_table(short[None], config)[0][0])
    torch.testing.assert_close(together[1], rotary_table(long[None], config)[0][0])
    assert not torch.equal(together[0, 1:], together[1, :-1])


def test_factor_on_scores_of_latent_attention() -> None:
    """0.1 * mscale_all_dim * ln(factor) + 1, squared."""
    latent = {"kv_lora_rank": 8, "qk_norm": False}
    assert score_factor(ModelConfig.model_validate(latent)) == 1.0
    config = ModelConfig.model_validate(latent | {"rope_scaling": SCALINGS["yarn of DeepSeek"]})
    assert score_factor(config) == pytest.approx((0.1 * 0.7 * 3.68887945) ** 2 + 2 * 0.1 * 0.7 * 3.68887945 + 1)


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({}, "rope_scaling: rope_type=None: one of linear, dynamic, yarn, llama3, longrope; null for plain positions"),
        ({"rope_type": "yern", "factor": 2}, "rope_scaling: rope_type=yern: one of linear"),
        ({"rope_type": "linear"}, "rope_scaling: rope_type=linear needs factor"),
        (
            {"rope_type": "linear", "factor": 2, "beta_fast": 3},
            "rope_scaling: beta_fast: rope_type=linear takes",
        ),
        ({"rope_type": "linear", "factor": "two"}, "rope_scaling: factor=two: a number above 0"),
        ({"rope_type": "linear", "factor": 0.5}, "rope_scaling: factor=0.5: at least 1"),
        ({"rope_type": "yarn", "factor": 2, "truncate": 1}, "rope_scaling: truncate=1: true or false"),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            r"rope_scaling: (short|long)_factor=\[1.0\]: 32 numbers above 0",
        ),
    ],
)
def test_refused(scaling: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ModelConfig(rope_scaling=scaling)


def test_length_of_pretraining_is_written_out() -> None:
    """So that a longer max_position_embeddings later does not change what a checkpoint computes."""
    config = ModelConfig(rope_scaling={"rope_type": "yarn", "factor": 2}, max_position_embeddings=128)
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"partial_rotary_factor": 0.4, "head_dim": 8}, "an even part of head_dim=8 is turned, not 3"),
        ({"layer_types": ["full_attention"]}, "layer_types: 1 entries; one for each of num_hidden_layers=8"),
        ({"layer_types": ["sliding_attention"] * 8}, "layer_types: sliding_attention needs sliding_window"),
        ({"qkv_bias": True, "attention_bias": True}, "qkv_bias=true: attention_bias=true gives"),
        ({"qk_norm": False, "qk_norm_per_head": False}, "qk_norm_per_head=false: with qk_norm=false"),
        ({"q_lora_rank": 4}, "q_lora_rank=4: needs kv_lora_rank"),
        ({"kv_lora_rank": 4}, "qk_norm=True: not with kv_lora_rank"),
        ({"kv_lora_rank": 4, "qk_norm": False, "num_key_value_heads": 2}, "num_key_value_heads=2: with kv_lora_rank"),
        ({"shared_expert_gate": True}, "shared_expert_gate=true: there is no shared expert"),
    ],
)
def test_attention_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ModelConfig.model_validate(changes)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_query_sees_its_window(implementation: str) -> None:
    """Two layers, windows of 3 tokens: what is more than 4 tokens before a query does not reach it, across documents
    not at all. Planted: `triu(-window)`."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4}
    config = ModelConfig.model_validate(
        sizes | {"sliding_window": 3, "attn_implementation": implementation, "initializer_range": 0.2}
    )
    torch.manual_seed(0)
    model = Transformer(config)
    model.initialize(0)
    ids = torch.randint(0, 50, (1, 12))
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 50
    moved = (model(ids) - model(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False] * 2 + [True] * 5 + [False] * 5
    documents = torch.tensor([[0] * 5 + [1] * 7])
    moved = (model(ids, document_ids=documents) - model(changed, document_ids=documents)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False] * 2 + [True] * 3 + [False] * 7
    config.layer_types = ["full_attention", "sliding_attention"]
    mixed = Transformer(config)
    mixed.load_state_dict(model.state_dict())
    moved = (mixed(ids) - mixed(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False] * 2 + [True] * 10
