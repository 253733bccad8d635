"""A Hugging Face `config.json` as model keys: what it says is understood exactly, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_dist.config_loading.text_files import read_text
from moe_dist.config_loading.wording import ConfigError, show


def _words(text: str) -> list[str]:
    return text.split()


_COPIED = _words(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "num_experts_per_tok norm_topk_prob max_position_embeddings rms_norm_eps attention_dropout "
    "tie_word_embeddings initializer_range"
)
_QWEN3_ONLY = _words("intermediate_size moe_intermediate_size decoder_sparse_step mlp_only_layers")
_NEEDED = _words("vocab_size hidden_size num_hidden_layers num_attention_heads num_experts num_experts_per_tok")
# What a missing key means there, where that differs from config.py.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"max_position_embeddings": 32768, "norm_topk_prob": False},
    "mixtral": {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
}
# Say nothing about the arithmetic of the model.
_BOOKKEEPING = set(
    _words(
        "_name_or_path _attn_implementation_autoset architectures auto_map bos_token_id "
        "chunk_size_feed_forward dtype eos_token_id id2label is_encoder_decoder label2id "
        "max_window_layers model_type output_attentions output_hidden_states output_router_logits "
        "pad_token_id problem_type return_dict torch_dtype transformers_version use_cache"
    )
)
# Keys this model can only have one way.
_FIXED: dict[str, tuple[Any, ...]] = {
    "qkv_bias": (False,),
    "use_qk_norm": (True,),
    "shared_expert_intermediate_size": (0, None),
    "partial_rotary_factor": (1, None),
}


def read_huggingface(file: Path, said: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A Qwen3-MoE or Mixtral `config.json`: the model's keys, and balance defaults a person may override.

    Raises ConfigError for another model_type and for every key whose meaning this model does not have.
    """
    text = read_text(file, said, "*.json")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(raw, dict) or str(raw.get("model_type")) not in _DEFAULTS:
        kind = raw.get("model_type") if isinstance(raw, dict) else None
        raise ConfigError(f"{said}: model_type={show(kind)} ({file}); allowed: {', '.join(sorted(_DEFAULTS))}")
    kind = raw["model_type"]
    model = dict(_DEFAULTS[kind], qk_norm=kind == "qwen3_moe")
    if kind == "mixtral":
        model["norm_topk_prob"] = True

    def refuse(key: str, value: Any, takes: str) -> ConfigError:
        return ConfigError(f"{key}={show(value)}: {takes} ({file})")

    rest = {key: value for key, value in raw.items() if key not in _BOOKKEEPING}
    for name in ("rope_theta", "rope_parameters", "rope_scaling"):  # the last two: transformers 5 and 4
        rope = rest.pop(name, None)
        if isinstance(rope, dict):
            for key, value in rope.items():
                if key == "rope_theta":
                    model[key] = value
                elif key not in ("rope_type", "type") or value != "default":
                    raise refuse(f"{name}.{key}", value, "only rope_type=default")
        elif rope is not None:
            model["rope_theta"] = rope
    window = rest.pop("sliding_window", None)
    if rest.pop("use_sliding_window", kind == "mixtral") and window is not None:
        raise refuse("sliding_window", window, "only null; attention here always sees the whole sequence")
    layers = rest.pop("layer_types", None) or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise refuse("layer_types", layers, "only full_attention")
    balance = {}
    for key, home in (
        ("router_aux_loss_coef", "router_aux_loss_coef"),
        ("router_jitter_noise", "router_jitter"),
    ):
        if key in rest:
            balance[f"balance.{home}"] = rest.pop(key)
    renamed = {"num_local_experts": "num_experts", "num_experts": "num_experts"}
    renamed |= {key: key for key in (*_COPIED, *(_QWEN3_ONLY if kind == "qwen3_moe" else ()))}
    if kind == "mixtral":
        renamed["intermediate_size"] = "moe_intermediate_size"
    for key, value in rest.items():
        if key in renamed:
            model[renamed[key]] = [] if key == "mlp_only_layers" and value is None else value
        elif key not in _FIXED:
            raise refuse(key, value, f"unknown key in a {kind} model")
        elif value not in _FIXED[key]:
            raise refuse(key, value, f"only {show(_FIXED[key][0])}")
    for key in (*_NEEDED, "moe_intermediate_size", "rope_theta"):
        if key not in model:
            raise ConfigError(f"{said}: {file} has no {key}")
    return {f"model.{key}": value for key, value in model.items()}, balance
