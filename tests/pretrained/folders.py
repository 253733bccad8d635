"""Hugging Face folders of tiny random models, as `transformers` saves them or as they lie about in the wild."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.config import ModelConfig
from moe_dist.models.huggingface import huggingface_config, parts, public_name

BASE = {
    "vocab_size": 264,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "rope_theta": 50000.0,
}
MODELS = {
    "qwen": ModelConfig.model_validate(BASE),
    "qwen-tied-dense-layer": ModelConfig.model_validate(
        BASE | {"tie_word_embeddings": True, "mlp_only_layers": [0], "attention_bias": True}
    ),
    "mixtral": ModelConfig.model_validate(BASE | {"qk_norm": False, "rms_norm_eps": 1e-5}),
}


def random_weights(config: ModelConfig, dtype: torch.dtype = torch.float32, fused: bool = False) -> dict[str, Tensor]:
    """Every tensor by public name; of tied embeddings without the head."""
    generator = torch.Generator().manual_seed(5)
    return {
        (name if fused else public_name(name, config)): torch.randn(part.shape, generator=generator).to(dtype)
        for name, part in parts(config, config.moe_layers if fused else ()).items()
        if name != "lm_head.weight" or not config.tie_word_embeddings
    }


def write_folder(
    folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], num_files: int = 1, **keys: Any
) -> Path:
    """config.json with these keys besides, and the weights in one file, or in several with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(huggingface_config(config) | keys))
    if num_files == 1:
        save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})
        return folder
    index = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[number::num_files]}
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder
