"""Mixtral with experts, Mistral and Llama without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_dist.config.families.base import (
    COMMON_NAMES,
    SIZES,
    ExpertNames,
    Family,
    Refuse,
    read_window,
    write_window,
)
from moe_dist.config.sections.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Windowed(Family):
    """A window of all layers, without a switch."""

    def read(self, rest: dict[str, Any], model: dict[str, Any], refuse: Refuse) -> None:
        read_window(rest, model, refuse, has_switch=False, has_types=False)

    def write(self, config: ModelConfig, values: dict[str, Any]) -> None:
        write_window(config, values, has_switch=False, has_types=False)


MIXTRAL = Windowed(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys={
        **SIZES,
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "intermediate_size": "moe_intermediate_size",
    },
    always={"qk_norm": False, "norm_topk_prob": True},
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    needed=(*Family.needed, "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    only={
        "qkv_bias": (False,),
        "shared_expert_intermediate_size": (0, None),
        "use_qk_norm": (False,),
        "norm_topk_prob": (True,),
        "attention_bias": (False,),
        "partial_rotary_factor": (1, None),
    },
    names={**COMMON_NAMES, "moe.router.weight": "block_sparse_moe.gate.weight"},
    names_in_memory=COMMON_NAMES,
    experts=ExpertNames(
        (
            "block_sparse_moe.experts.{e}.w1.weight",
            "block_sparse_moe.experts.{e}.w3.weight",
            "block_sparse_moe.experts.{e}.w2.weight",
        )
    ),
)
MISTRAL = Windowed(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys={**SIZES, "intermediate_size": "intermediate_size"},
    always={"qk_norm": False, "num_experts": 0},
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8},
    needed=(*Family.needed, "intermediate_size"),
    only={"partial_rotary_factor": (1, None)},
    names=COMMON_NAMES,
)
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys={**SIZES, "intermediate_size": "intermediate_size", "attention_bias": "attention_bias"},
    always={"qk_norm": False, "num_experts": 0},
    defaults={"max_position_embeddings": 2048},
    needed=(*Family.needed, "intermediate_size"),
    only={"mlp_bias": (False,), "pretraining_tp": (1,), "partial_rotary_factor": (1, None)},
    names=COMMON_NAMES,
)
