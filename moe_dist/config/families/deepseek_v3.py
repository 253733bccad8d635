"""DeepSeek-V3: multi-head latent attention; the routing of GLM-4.5 with groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_dist.config.families.base import (
    SIZES,
    Family,
    Refuse,
    read_first_dense,
    read_shared_experts,
    write_first_dense,
    write_shared_experts,
)
from moe_dist.config.families.glm4_moe import NEEDED, ROUTING, SELECTED
from moe_dist.config.sections.model import ModelConfig

_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave")


@dataclass(frozen=True, kw_only=True)
class DeepseekV3(Family):
    """As the module says."""

    def read(self, rest: dict[str, Any], model: dict[str, Any], refuse: Refuse) -> None:
        read_first_dense(rest, model, refuse, default=3)
        read_shared_experts(rest, model, refuse)
        plain, turned = model["qk_nope_head_dim"], model["qk_rope_head_dim"]
        for key, size in (("head_dim", turned), ("qk_head_dim", plain + turned)):  # as transformers writes them
            if (said := rest.pop(key, size)) != size:
                raise refuse(key, said, f"{size}, which follows from qk_rope_head_dim and qk_nope_head_dim")

    def write(self, config: ModelConfig, values: dict[str, Any]) -> None:
        write_first_dense(config, values)
        write_shared_experts(config, values)
        # What others than transformers look for.
        values |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}


DEEPSEEK_V3 = DeepseekV3(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys={
        **{key: key for key in SIZES if key != "head_dim"},
        **ROUTING,
        **{key: key for key in (*_LATENT, "attention_bias")},
    },
    always={"scoring_func": "sigmoid", "qk_norm": False},
    defaults={
        "max_position_embeddings": 4096,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "norm_topk_prob": True,
    },
    needed=NEEDED,
    only={
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
        "ep_size": (1,),
        "pretraining_tp": (1,),
        "partial_rotary_factor": (1, None),
    },
    ignored=("num_nextn_predict_layers", "num_mtp_layers", "aux_loss_alpha", "seq_aux"),
    names={
        **SELECTED,
        "attention.q_a_norm.": "self_attn.q_a_layernorm.",
        "attention.kv_a_norm.": "self_attn.kv_a_layernorm.",
        "attention.kv_a_proj.": "self_attn.kv_a_proj_with_mqa.",
    },
    predicts_further=True,
    exact=("e_score_correction_bias",),
)
