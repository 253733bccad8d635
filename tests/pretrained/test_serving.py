"""What the loaders of vLLM and SGLang need of an exported folder: keys, names and shapes, each with where it is asked
for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from folders import EVERY, random_weights, write_folder
from safetensors import safe_open

from moe_dist.config import ModelConfig

# vllm-project/vllm, vllm/model_executor/models/qwen3_moe.py at 002456df, mixtral.py at 005df92d, qwen2_moe.py
# at 002fb907, olmoe.py at 048a32c7, glm4_moe.py and deepseek_v2.py at 002d6073, gpt_oss.py at a6b6cfaa.
# sgl-project/sglang, python/sglang/srt/models/glm4_moe.py at 005ffc65, gpt_oss.py at 009c6808, and
# deepseek_common/deepseek_weight_loader.py at 0201c04e: they look for the same names.
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
GLM4_MOE: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "n_routed_experts": 6,  # Glm4MoE
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "hidden_size": 16,
    "hidden_act": "silu",  # anything else is refused
    "intermediate_size": 20,
    "first_k_dense_replace": 1,  # Glm4MoeDecoderLayer: which layers have experts
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": True,
    "use_qk_norm": False,
    "partial_rotary_factor": 0.5,  # 0.5 where it is missing
    "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},  # Glm4MoeAttention
    "max_position_embeddings": 256,  # 131072 where it is missing
    "rms_norm_eps": 1e-6,
    "vocab_size": 264,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,  # it does not ask: the head is always its own
}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",  # DeepseekV2DecoderLayer: which attention
    "n_routed_experts": 6,  # DeepseekV2MoE
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "n_group": 2,  # 1 where it is missing, as the next
    "topk_group": 1,
    "routed_scaling_factor": 2.5,  # 1 where it is missing
    "scoring_func": "sigmoid",  # softmax where it is missing
    "topk_method": "noaux_tc",  # no selection bias where it is missing
    "hidden_size": 16,
    "hidden_act": "silu",  # DeepseekV2MLP: anything else is refused
    "intermediate_size": 20,
    "first_k_dense_replace": 1,  # DeepseekV2DecoderLayer
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
    "max_position_embeddings": 256,  # 8192 where it is missing
    "rms_norm_eps": 1e-6,
    "vocab_size": 264,
    "num_hidden_layers": 2,
    "attention_bias": False,  # it asks for none of these: so it is in the code
    "rope_interleave": True,
    "tie_word_embeddings": False,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,  # OAIAttention: a KeyError where one of these is missing
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,  # true where it is missing
}
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "num_local_experts": 6,  # MLPBlock
    "num_experts_per_tok": 2,
    "intermediate_size": 12,
    "hidden_size": 16,
    "num_attention_heads": 4,  # OAIAttention
    "num_key_value_heads": 2,
    "head_dim": 6,
    "sliding_window": 4,
    "rope_parameters": {"rope_theta": 50000.0, **_YARN},
    "rope_theta": 50000.0,  # the form of transformers 4, which older versions ask for
    "rope_scaling": _YARN,
    "max_position_embeddings": 256,
    "vocab_size": 264,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "attention_bias": True,  # SGLang, GptOssDecoderLayer, as the rest
    "layer_types": ["sliding_attention", "full_attention"],
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
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
_DENSE_LAYER = {
    r"model\.layers\.\d\.mlp\.(gate|up)_proj\.weight": [20, 16],
    r"model\.layers\.\d\.mlp\.down_proj\.weight": [16, 20],
}
_SELECTED = {
    **_DENSE_LAYER,
    **_EXPERTS,
    r"model\.layers\.\d\.mlp\.shared_experts\.(gate|up)_proj\.weight": [12, 16],
    r"model\.layers\.\d\.mlp\.shared_experts\.down_proj\.weight": [16, 12],
    r"model\.layers\.\d\.mlp\.gate\.e_score_correction_bias": [6],
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
    "glm4_moe-0": _COMMON
    | _SELECTED
    | {
        r"model\.layers\.\d\.self_attn\.q_proj\.weight": [32, 16],
        r"model\.layers\.\d\.self_attn\.q_proj\.bias": [32],
        r"model\.layers\.\d\.self_attn\.[kv]_proj\.weight": [16, 16],
        r"model\.layers\.\d\.self_attn\.[kv]_proj\.bias": [16],
        r"model\.layers\.\d\.self_attn\.o_proj\.weight": [16, 32],
    },
    "deepseek_v3-0": {name: shape for name, shape in _COMMON.items() if "self_attn" not in name}
    | _SELECTED
    | {
        # mla_params_mapping: the first two become fused_qkv_a_proj.
        r"model\.layers\.\d\.self_attn\.q_a_proj\.weight": [14, 16],
        r"model\.layers\.\d\.self_attn\.kv_a_proj_with_mqa\.weight": [10 + 4, 16],
        r"model\.layers\.\d\.self_attn\.q_a_layernorm\.weight": [14],
        r"model\.layers\.\d\.self_attn\.kv_a_layernorm\.weight": [10],
        r"model\.layers\.\d\.self_attn\.q_b_proj\.weight": [4 * (6 + 4), 14],
        r"model\.layers\.\d\.self_attn\.kv_b_proj\.weight": [4 * (6 + 7), 10],
        r"model\.layers\.\d\.self_attn\.o_proj\.weight": [16, 4 * 7],
    },
    "gpt_oss-0": _COMMON
    | {
        r"model\.layers\.\d\.self_attn\.q_proj\.bias": [24],
        r"model\.layers\.\d\.self_attn\.[kv]_proj\.bias": [12],
        r"model\.layers\.\d\.self_attn\.o_proj\.bias": [16],
        r"model\.layers\.\d\.self_attn\.sinks": [4],
        r"model\.layers\.\d\.mlp\.router\.weight": [6, 16],
        r"model\.layers\.\d\.mlp\.router\.bias": [6],
        # _load_weights_other: stacks (E, D, 2F) and (E, F, D), each transposed to be w13 and w2.
        r"model\.layers\.\d\.mlp\.experts\.gate_up_proj": [6, 16, 24],
        r"model\.layers\.\d\.mlp\.experts\.gate_up_proj_bias": [6, 24],
        r"model\.layers\.\d\.mlp\.experts\.down_proj": [6, 12, 16],
        r"model\.layers\.\d\.mlp\.experts\.down_proj_bias": [6, 16],
    },
}


ASKED = {
    "qwen3_moe-0": QWEN3_MOE,
    "mixtral-0": MIXTRAL,
    "qwen2_moe-0": QWEN2_MOE,
    "olmoe-0": OLMOE,
    "glm4_moe-0": GLM4_MOE,
    "deepseek_v3-0": DEEPSEEK_V3,
    "gpt_oss-0": GPT_OSS,
}


@pytest.mark.parametrize(("name", "keys"), ASKED.items())
def test_a_folder_has_what_its_loader_asks_for(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    """All of it, and no tensor that the loader would not know: it skips those, or ends with a KeyError."""
    config = EVERY[name]
    folder = write_folder(tmp_path / "hf", config, random_weights(config))
    said = json.loads((folder / "config.json").read_text())
    assert {key: said.get(key) for key in keys} == keys
    found: dict[str, list[int]] = {pattern: [] for pattern in NAMES[name]}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for tensor in file.keys():  # noqa: SIM118 - not a dict
            (pattern,) = [pattern for pattern in NAMES[name] if re.fullmatch(pattern, tensor)]
            assert file.get_slice(tensor).get_shape() == NAMES[name][pattern], tensor
            found[pattern].append(int(tensor.split(".")[2]) if "layers" in tensor else -1)
    assert {pattern: set(layers) for pattern, layers in found.items()} == {
        pattern: set(_layers_of(pattern, config)) for pattern in found
    }
    matrices = [layer for pattern, layers in found.items() if r"experts\.\d" in pattern for layer in layers]
    assert len(matrices) == (0 if name == "gpt_oss-0" else len(config.moe_layers) * 6 * 3)


def _layers_of(pattern: str, config: ModelConfig) -> Iterable[int]:
    """Where it is to be found; -1: outside layers."""
    if "layers" not in pattern:
        return [-1]
    every = range(config.num_hidden_layers)
    if pattern in _DENSE_LAYER:
        return set(every) - set(config.moe_layers)
    return config.moe_layers if r"\.mlp\." in pattern or "block_sparse_moe" in pattern else every
