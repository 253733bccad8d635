"""Analytic parameter counts against modules on the meta device."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from moe_dist.config import ModelConfig, load_config
from moe_dist.models.counts import parameter_counts
from moe_dist.models.transformer import Transformer

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PUBLISHED = {  # total and active, in billions
    "qwen3_30b_a3b": (30.53, 3.35),
    "qwen3_235b_a22b": (235.09, 22.19),
    "qwen3_coder_480b_a35b": (480.15, 35.47),
    "mixtral_8x7b": (46.70, 12.88),
    "mixtral_8x22b": (140.62, 39.15),
}


def numel(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


def random_config(seed: int) -> ModelConfig:
    draw = random.Random(seed)
    heads, layers = draw.choice([2, 4, 6]), draw.randint(1, 5)
    num_experts = draw.choice([0, 2, 5, 8])
    return ModelConfig(
        vocab_size=draw.randint(10, 99),
        hidden_size=heads * 2 * draw.randint(1, 5),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        head_dim=draw.choice([None, 6]),
        intermediate_size=draw.randint(1, 40),
        moe_intermediate_size=draw.randint(1, 40),
        num_experts=num_experts,
        num_experts_per_tok=draw.randint(2, num_experts) if num_experts else 2,
        decoder_sparse_step=draw.choice([1, 1, 2]),
        mlp_only_layers=[layer for layer in range(layers) if draw.random() < 0.2],
        shared_expert_intermediate_size=draw.choice([0, 7]),
        qk_norm=draw.random() < 0.5,
        attention_bias=draw.random() < 0.3,
        tie_word_embeddings=draw.random() < 0.3,
    )


@pytest.mark.parametrize("seed", range(24))
def test_random_models(seed: int) -> None:
    config = random_config(seed)
    assert parameter_counts(config).total == numel(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_run_files(path: Path) -> None:
    config = load_config(path).model
    counts = parameter_counts(config)
    assert counts.total == numel(config)
    if path.stem in PUBLISHED:
        total, active = PUBLISHED[path.stem]
        assert round(counts.total / 1e9, 2) == pytest.approx(total, abs=0.005)
        assert round(counts.active / 1e9, 2) == pytest.approx(active, abs=0.005)


def test_the_published_models_are_there() -> None:
    assert set(PUBLISHED) <= {path.stem for path in CONFIGS}
