"""OLMoE: queries and keys normed over all heads together, raw weights of the experts chosen."""

from __future__ import annotations

from moe_dist.config.families.base import COMMON_NAMES, EXPERTS, SIZES, Family

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    keys={
        **{key: key for key in SIZES if key != "head_dim"},
        **EXPERTS,
        "attention_bias": "attention_bias",
        "clip_qkv": "clip_qkv",
        "intermediate_size": "moe_intermediate_size",
    },
    always={"qk_norm": True, "qk_norm_per_head": False},
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "norm_topk_prob": False},
    needed=(*Family.needed, "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    only={"partial_rotary_factor": (1, None)},
    names=COMMON_NAMES,
)
