"""gpt-oss: clamped units with biases, attention sinks, a window in every second layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_dist.config.families.base import COMMON_NAMES, SIZES, ExpertNames, Family, Refuse, read_window, write_window
from moe_dist.config.sections.model import ModelConfig
from moe_dist.config.sections.rope import YARN_BOUNDS


@dataclass(frozen=True, kw_only=True)
class GptOss(Family):
    """As the module says."""

    def read(self, rest: dict[str, Any], model: dict[str, Any], refuse: Refuse) -> None:
        count = model.get("num_hidden_layers", 0)
        if rest.get("layer_types") is None and isinstance(count, int):
            rest["layer_types"] = [("sliding_attention", "full_attention")[layer % 2] for layer in range(count)]
        read_window(rest, model, refuse, has_switch=False, has_types=True)

    def write(self, config: ModelConfig, values: dict[str, Any]) -> None:
        write_window(config, values, has_switch=False, has_types=True)
        # transformers wants a window even where no layer has it.
        values |= {"sliding_window": values["sliding_window"] or 128, "swiglu_limit": 7.0, "swiglu_alpha": 1.702}
        values["attention_bias"] = True  # SGLang asks for it
        for name in ("rope_parameters", "rope_scaling"):  # vLLM has no defaults for these
            if values[name] is not None and values[name]["rope_type"] == "yarn":
                values[name] = {**YARN_BOUNDS, **values[name]}


GPT_OSS = GptOss(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    keys={
        **SIZES,
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "intermediate_size": "moe_intermediate_size",
    },
    always={
        "qk_norm": False,
        "attention_bias": True,
        "attention_sinks": True,
        "router_bias": True,
        "norm_topk_prob": True,
        "expert": "swiglu_clamped",
    },
    defaults={"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 64},
    needed=(*Family.needed, "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    only={
        "attention_bias": (True,),
        "swiglu_limit": (7, None),
        "swiglu_alpha": (1.702, None),
        "partial_rotary_factor": (1, None),
    },
    ignored=("experts_per_token", "initial_context_length"),
    names={
        **COMMON_NAMES,
        "moe.router.weight": "mlp.router.weight",
        "moe.router.logits_bias_E": "mlp.router.bias",
    },
    experts=ExpertNames(None, is_transposed=False, is_interleaved=True),
)
