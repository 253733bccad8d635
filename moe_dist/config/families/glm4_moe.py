"""GLM-4.5: sigmoid scores with a selection bias, shared experts, dense layers first, half of each head turned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_dist.config.families.base import (
    COMMON_NAMES,
    SIZES,
    Family,
    Refuse,
    read_first_dense,
    read_shared_experts,
    same,
    write_first_dense,
    write_shared_experts,
)
from moe_dist.config.sections.model import ModelConfig

SELECTED = {
    **COMMON_NAMES,
    "moe.router.bias_E": "mlp.gate.e_score_correction_bias",
    "moe.shared_expert.": "mlp.shared_experts.",
}
"""Names of what DeepSeek-V3 and its heirs have besides."""
ROUTING = {
    **same("num_experts_per_tok norm_topk_prob"),
    **same("n_group topk_group routed_scaling_factor"),
    **same("intermediate_size moe_intermediate_size"),
    "n_routed_experts": "num_experts",
}
NEEDED = (*Family.needed, "num_experts", "num_experts_per_tok", "intermediate_size", "moe_intermediate_size")


@dataclass(frozen=True, kw_only=True)
class Glm4Moe(Family):
    """As the module says."""

    def read(self, rest: dict[str, Any], model: dict[str, Any], refuse: Refuse) -> None:
        read_first_dense(rest, model, refuse, default=1)
        read_shared_experts(rest, model, refuse)

    def write(self, config: ModelConfig, values: dict[str, Any]) -> None:
        write_first_dense(config, values)
        write_shared_experts(config, values)


GLM4_MOE = Glm4Moe(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    keys={
        **SIZES,
        **ROUTING,
        "use_qk_norm": "qk_norm",
        "partial_rotary_factor": "partial_rotary_factor",
        "attention_bias": "qkv_bias",  # its output projection has none
    },
    always={"scoring_func": "sigmoid"},
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "qk_norm": False,
        "partial_rotary_factor": 0.5,
        "qkv_bias": False,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    needed=NEEDED,
    only={},
    ignored=("num_nextn_predict_layers", "num_mtp_layers"),
    names=SELECTED,
    predicts_further=True,
    exact=("e_score_correction_bias",),
)
