"""What vLLM's loaders need of an exported folder: keys, names and shapes, each with where it is asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from folders import EVERY, random_weights, write_folder
from safetensors import safe_open

# vllm-project/vllm, vllm/model_executor/models/qwen3_moe.py at 002456df, mixtral.py at 005df92d, qwen2_moe.py
# at 002fb907, olmoe.py at 048a32c7.
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],  # registry.py: which class is built
    "num_experts": 6,  # Qwen3MoeSparseMoeBlock
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "hidden_size": 16,
    "hidden_act": "silu",  # Qwen3MoeMLP: anything else is refused
    "intermediate_size": 20,
    "decoder_sparse_step": 1,  # Qwen3MoeDecoderLayer: which layers have experts
    "mlp_only_layers": [],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "attention_bias": False,
    "rope_theta": 50000.0,  # 10000 where it is missing
    "rope_scaling": None,
    "max_position_embeddings": 256,  # 8192 where it is missing
    "rms_norm_eps": 1e-6,
    "vocab_size": 264,  # Qwen3MoeModel
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,  # Qwen3MoeForCausalLM
}
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 6,  # MixtralMoE
    "num_experts_per_tok": 2,
    "intermediate_size": 12,
    "hidden_size": 16,
    "num_attention_heads": 4,  # MixtralAttention
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rope_theta": 50000.0,
    "sliding_window": None,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "vocab_size": 264,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
QWEN2_MOE: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 6,  # Qwen2MoeSparseMoeBlock
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
    "norm_topk_prob": True,
    "hidden_size": 16,
    "hidden_act": "silu",  # Qwen2MoeMLP: anything else is refused
    "intermediate_size": 20,
    "decoder_sparse_step": 1,  # Qwen2MoeDecoderLayer
    "mlp_only_layers": [],
    "num_attention_heads": 4,  # heads have hidden_size / num_attention_heads
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
    "max_position_embeddings": 256,  # 8192 where it is missing
    "rms_norm_eps": 1e-6,
    "vocab_size": 264,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "num_experts": 6,  # OlmoeDecoderLayer
    "num_experts_per_tok": 2,
    "intermediate_size": 12,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
    "max_position_embeddings": 256,  # 4096 where it is missing
    "vocab_size": 264,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,  # it asks for none of these: its own values stand in the code
    "norm_topk_prob": False,
    "clip_qkv": None,
}
_COMMON = {
    r"model\.embed_tokens\.weight": [264, 16],
    r"lm_head\.weight": [264, 16],
    r"model\.norm\.weight": [16],
    r"model\.layers\.\d\.(input|post_attention)_layernorm\.weight": [16],
    # stacked_params_mapping: three matrices become qkv_proj.
    r"model\.layers\.\d\.self_attn\.q_proj\.weight": [24, 16],
    r"model\.layers\.\d\.self_attn\.[kv]_proj\.weight": [12, 16],
    r"model\.layers\.\d\.self_attn\.o_proj\.weight": [16, 24],
}
_HEADS_OF_FOUR = _COMMON | {
    r"model\.layers\.\d\.self_attn\.q_proj\.weight": [16, 16],
    r"model\.layers\.\d\.self_attn\.[kv]_proj\.weight": [8, 16],
    r"model\.layers\.\d\.self_attn\.o_proj\.weight": [16, 16],
}
_EXPERTS = {
    r"model\.layers\.\d\.mlp\.gate\.weight": [6, 16],
    # FusedMoE.make_expert_params_mapping: gate_proj and up_proj are w1 and w3, down_proj is w2.
    r"model\.layers\.\d\.mlp\.experts\.\d\.(gate|up)_proj\.weight": [12, 16],
    r"model\.layers\.\d\.mlp\.experts\.\d\.down_proj\.weight": [16, 12],
}
NAMES: dict[str, dict[str, list[int]]] = {
    "qwen3_moe-0": _COMMON | _EXPERTS | {r"model\.layers\.\d\.self_attn\.[qk]_norm\.weight": [6]},
    "qwen2_moe-0": _HEADS_OF_FOUR
    | _EXPERTS
    | {
        r"model\.layers\.\d\.self_attn\.q_proj\.bias": [16],
        r"model\.layers\.\d\.self_attn\.[kv]_proj\.bias": [8],
        r"model\.layers\.\d\.mlp\.shared_expert\.(gate|up)_proj\.weight": [10, 16],
        r"model\.layers\.\d\.mlp\.shared_expert\.down_proj\.weight": [16, 10],
        r"model\.layers\.\d\.mlp\.shared_expert_gate\.weight": [1, 16],
    },
    "olmoe-0": _HEADS_OF_FOUR
    | _EXPERTS
    | {
        r"model\.layers\.\d\.self_attn\.q_norm\.weight": [16],
        r"model\.layers\.\d\.self_attn\.k_norm\.weight": [8],
    },
    "mixtral-0": _COMMON
    | {
        r"model\.layers\.\d\.block_sparse_moe\.gate\.weight": [6, 16],
        r"model\.layers\.\d\.block_sparse_moe\.experts\.\d\.w[13]\.weight": [12, 16],
        r"model\.layers\.\d\.block_sparse_moe\.experts\.\d\.w2\.weight": [16, 12],
    },
}


ASKED = {"qwen3_moe-0": QWEN3_MOE, "mixtral-0": MIXTRAL, "qwen2_moe-0": QWEN2_MOE, "olmoe-0": OLMOE}


@pytest.mark.parametrize(("name", "keys"), ASKED.items())
def test_a_folder_has_what_its_loader_asks_for(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    """All of it, and no tensor that the loader would not know: it skips those, or ends with a KeyError."""
    config = EVERY[name]
    folder = write_folder(tmp_path / "hf", config, random_weights(config))
    said = json.loads((folder / "config.json").read_text())
    assert {key: said.get(key) for key in keys} == keys
    found = dict.fromkeys(NAMES[name], 0)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for tensor in file.keys():  # noqa: SIM118 - not a dict
            (pattern,) = [pattern for pattern in NAMES[name] if re.fullmatch(pattern, tensor)]
            assert file.get_slice(tensor).get_shape() == NAMES[name][pattern], tensor
            found[pattern] += 1
    per_layer = {pattern: count for pattern, count in found.items() if r"\d\." in pattern}
    assert all(count % 2 == 0 for count in per_layer.values()), found
    experts = sum(count for pattern, count in found.items() if r"experts\." in pattern)
    assert experts == 2 * 6 * 3
    assert all(found.values()), found
