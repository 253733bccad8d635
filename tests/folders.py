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
from moe_dist.models.huggingface import huggingface_config
from moe_dist.models.tensor_names import Names, family_of

BASE: dict[str, Any] = {
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
    "max_position_embeddings": 256,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_SELECTED = {"scoring_func": "sigmoid", "shared_expert_intermediate_size": 12, "mlp_only_layers": [0]}
_LATENT = {
    "qk_norm": False,
    "num_key_value_heads": 4,
    "head_dim": None,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
}
_BY_HEADS = {"head_dim": None}  # a family without head_dim: hidden_size / heads
_DENSE = {"num_experts": 0}
_TIED = {"tie_word_embeddings": True}

FAMILIES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "qwen3_moe": (
        {},
        [
            {},
            _TIED | {"mlp_only_layers": [0], "attention_bias": True},
            {"norm_topk_prob": False, "num_experts_per_tok": 1, "num_key_value_heads": 4},
            {"num_hidden_layers": 3, "decoder_sparse_step": 2, "hidden_act": "gelu_tanh"},
            {"sliding_window": 5, "hidden_size": 18, "moe_intermediate_size": 7, "num_experts": 5},
            {"rope_scaling": _YARN, "head_dim": 10},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "hidden_act": "gelu"},
        ],
    ),
    "mixtral": (
        {"qk_norm": False, "rms_norm_eps": 1e-5},
        [
            {},
            _TIED,
            {"sliding_window": 4, "num_key_value_heads": 1, "num_experts_per_tok": 3},
            {"hidden_size": 20, "moe_intermediate_size": 9, "num_experts": 3},
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 4},
            {"num_hidden_layers": 3, "hidden_act": "gelu"},
        ],
    ),
    "qwen2_moe": (
        _BY_HEADS
        | {"qk_norm": False, "qkv_bias": True, "shared_expert_gate": True, "shared_expert_intermediate_size": 10},
        [
            {},
            _TIED | {"mlp_only_layers": [1]},
            {"qkv_bias": False, "norm_topk_prob": False},
            {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]},
            {"num_hidden_layers": 4, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 7},
            {"hidden_size": 24, "num_experts": 5, "sliding_window": 6, "num_key_value_heads": 1},
        ],
    ),
    "olmoe": (
        _BY_HEADS | {"qk_norm_per_head": False, "norm_topk_prob": False, "rms_norm_eps": 1e-5},
        [
            {},
            _TIED | {"norm_topk_prob": True},
            {"clip_qkv": 0.5},
            {"attention_bias": True, "num_key_value_heads": 4},
            {"hidden_size": 24, "moe_intermediate_size": 5, "num_experts": 7, "num_experts_per_tok": 3},
            {"num_hidden_layers": 3, "clip_qkv": 2.0, "num_key_value_heads": 1},
        ],
    ),
    "glm4_moe": (
        _SELECTED | {"qk_norm": False, "qkv_bias": True, "head_dim": 8, "partial_rotary_factor": 0.5},
        [
            {"routed_scaling_factor": 2.5},
            _TIED | {"qk_norm": True},
            {"mlp_only_layers": [], "partial_rotary_factor": 1.0},
            {"n_group": 2, "topk_group": 1, "qkv_bias": False},
            {"n_group": 3, "topk_group": 2, "num_hidden_layers": 3, "mlp_only_layers": [0, 1]},
            {"shared_expert_intermediate_size": 24, "norm_topk_prob": False, "head_dim": 12, "hidden_size": 20},
        ],
    ),
    "deepseek_v3": (
        _SELECTED | _LATENT,
        [
            {"routed_scaling_factor": 2.5},
            _TIED | {"q_lora_rank": None, "attention_bias": True},
            {"rope_interleave": False, "n_group": 1},
            {"mlp_only_layers": [], "n_group": 3, "topk_group": 2},
            {"rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "norm_topk_prob": False},
            {"hidden_size": 18, "v_head_dim": 5, "kv_lora_rank": 9, "num_attention_heads": 3, "num_key_value_heads": 3},
        ],
    ),
    "gpt_oss": (
        {
            "qk_norm": False,
            "attention_bias": True,
            "attention_sinks": True,
            "router_bias": True,
            "expert": "swiglu_clamped",
            "sliding_window": 4,
            "rope_scaling": _YARN | {"truncate": False},
            "layer_types": ["sliding_attention", "full_attention"],
        },
        [
            {},
            _TIED,
            {"layer_types": ["full_attention", "sliding_attention"], "num_key_value_heads": 1},
            {"sliding_window": None, "layer_types": [], "rope_scaling": None},
            {"hidden_size": 20, "moe_intermediate_size": 9, "num_experts": 5, "num_experts_per_tok": 4},
            {"num_hidden_layers": 3, "layer_types": [], "head_dim": 10},
        ],
    ),
    "qwen3": (_DENSE, [{}, _TIED | {"attention_bias": True, "sliding_window": 5}]),
    "llama": (_DENSE | {"qk_norm": False}, [{}, {"attention_bias": True, "rope_scaling": None} | _TIED]),
    "mistral": (_DENSE | {"qk_norm": False, "sliding_window": 4}, [{}]),
    "qwen2": (_DENSE | _BY_HEADS | {"qk_norm": False, "qkv_bias": True}, [{}, _TIED | {"num_key_value_heads": 4}]),
}
EVERY = {
    f"{family}-{number}": ModelConfig.model_validate(BASE | common | changes)
    for family, (common, variants) in FAMILIES.items()
    for number, changes in enumerate(variants)
}
"""Tiny models of every family: odd sizes, tied embeddings, every switch its config.json has."""
MODELS = {
    "qwen": EVERY["qwen3_moe-0"],
    "qwen-tied-dense-layer": EVERY["qwen3_moe-1"],
    "mixtral": EVERY["mixtral-0"],
}


def random_weights(config: ModelConfig, dtype: torch.dtype = torch.float32, fused: bool = False) -> dict[str, Tensor]:
    """Every tensor by public name, `fused` by that of a loaded model; of tied embeddings without the head.

    As large as initial weights, so that nothing saturates, with norms near one.
    """
    generator = torch.Generator().manual_seed(5)
    names = Names(config)
    return {
        name: (torch.randn(part.shape, generator=generator) * 0.2 + ("norm" in name)).to(dtype)
        for name, part in (names.in_memory() if fused else names.parts()).items()
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


def kind_of(config: ModelConfig) -> str:
    """The model_type that it is written as."""
    return family_of(config).model_type
