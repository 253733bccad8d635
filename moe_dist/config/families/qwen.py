"""Qwen: 3 and 2 with experts, 3 and 2 without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_dist.config.families.base import (
    COMMON_NAMES,
    EXPERTS,
    SIZES,
    Family,
    Refuse,
    read_window,
    same,
    write_window,
)
from moe_dist.config.sections.model import ModelConfig

_LAYERS = same("intermediate_size decoder_sparse_step mlp_only_layers")
_NEEDED = (*Family.needed, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
_PLAIN: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (1, None)}


@dataclass(frozen=True, kw_only=True)
class Qwen(Family):
    """A window behind a switch."""

    has_types: bool = True
    """Whether some layers may have the window and others not."""

    def read(self, rest: dict[str, Any], model: dict[str, Any], refuse: Refuse) -> None:
        if model.get("mlp_only_layers", ()) is None:
            model["mlp_only_layers"] = []
        slides = rest.get("use_sliding_window") and rest.get("sliding_window") is not None
        first = rest.pop("max_window_layers", None)
        if self.has_types and slides and rest.get("layer_types") is None and first not in (None, 0):
            what = "layer_types must say which layers slide: versions of transformers read this key in different ways"
            raise refuse("max_window_layers", first, what)
        read_window(rest, model, refuse, has_switch=True, has_types=self.has_types)

    def write(self, config: ModelConfig, values: dict[str, Any]) -> None:
        write_window(config, values, has_switch=True, has_types=self.has_types)


QWEN3_MOE = Qwen(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys={**SIZES, **EXPERTS, **_LAYERS, **same("moe_intermediate_size attention_bias")},
    always={"qk_norm": True},
    defaults={
        "max_position_embeddings": 32768,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
    },
    needed=_NEEDED,
    only={"qkv_bias": (False,), "shared_expert_intermediate_size": (0, None), "use_qk_norm": (True,), **_PLAIN},
    names=COMMON_NAMES,
    has_types=False,
)
QWEN2_MOE = Qwen(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    keys={
        **{key: key for key in SIZES if key != "head_dim"},
        **EXPERTS,
        **_LAYERS,
        **same("moe_intermediate_size shared_expert_intermediate_size qkv_bias"),
    },
    always={"qk_norm": False, "shared_expert_gate": True},
    defaults={
        "max_position_embeddings": 32768,
        "norm_topk_prob": False,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "intermediate_size": 5632,
        "shared_expert_intermediate_size": 5632,
    },
    needed=_NEEDED,
    only=_PLAIN,
    names={
        **COMMON_NAMES,
        "moe.shared_expert.": "mlp.shared_expert.",
        "moe.shared_expert_gate.": "mlp.shared_expert_gate.",
    },
)
QWEN3 = Qwen(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys={**SIZES, "intermediate_size": "intermediate_size", "attention_bias": "attention_bias"},
    always={"qk_norm": True, "num_experts": 0},
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    needed=(*Family.needed, "intermediate_size"),
    only=_PLAIN,
    names=COMMON_NAMES,
)
QWEN2 = Qwen(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys={**{key: key for key in SIZES if key != "head_dim"}, "intermediate_size": "intermediate_size"},
    always={"qk_norm": False, "qkv_bias": True, "num_experts": 0},
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    needed=(*Family.needed, "intermediate_size"),
    only=_PLAIN,
    names=COMMON_NAMES,
)
