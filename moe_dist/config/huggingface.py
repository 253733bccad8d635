"""A Hugging Face `config.json` as model keys: what it says is understood exactly, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from moe_dist.config.sections.model import ModelConfig
from moe_dist.config.text_files import read_text
from moe_dist.config.wording import ConfigError, show


def _words(text: str) -> list[str]:
    return text.split()


_COPIED = _words(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "num_experts_per_tok norm_topk_prob max_position_embeddings rms_norm_eps attention_dropout "
    "tie_word_embeddings initializer_range"
)
_QWEN3_ONLY = _words("intermediate_size moe_intermediate_size decoder_sparse_step mlp_only_layers attention_bias")
_NEEDED = _words("vocab_size hidden_size num_hidden_layers num_attention_heads num_experts num_experts_per_tok")
# What a missing key means there, where that differs from config.py.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "max_position_embeddings": 32768,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
    },
    "mixtral": {
        "max_position_embeddings": 131072,
        "norm_topk_prob": True,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    },
}
# Say nothing about the arithmetic of the model in training.
_BOOKKEEPING = set(
    _words(
        "_name_or_path _attn_implementation _attn_implementation_autoset architectures attn_implementation auto_map "
        "bos_token_id chunk_size_feed_forward dtype eos_token_id finetuning_task id2label is_decoder "
        "is_encoder_decoder label2id max_window_layers model_type output_attentions output_hidden_states "
        "output_router_logits pad_token_id prefix problem_type quantization_config return_dict sep_token_id "
        "task_specific_params tokenizer_class torch_dtype torchscript transformers_version unsloth_fixed "
        "unsloth_version use_bfloat16 use_cache"
    )
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "consolidated*.pt*")


class HuggingFaceModel(NamedTuple):
    """What a `config.json` says.

    `model`: the whole architecture, by full key. `balance`: defaults that a person may override. `ignored`: keys that
    say nothing about the arithmetic. `weights`: names of files with weights beside it.
    """

    model: dict[str, Any]
    balance: dict[str, Any]
    ignored: list[str]
    weights: list[str]


# Keys this model can only have one way.
_FIXED_IN_BOTH: dict[str, tuple[Any, ...]] = {
    "qkv_bias": (False,),
    "shared_expert_intermediate_size": (0, None),
    "partial_rotary_factor": (1, None),
}
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "qwen3_moe": _FIXED_IN_BOTH | {"use_qk_norm": (True,)},
    "mixtral": _FIXED_IN_BOTH | {"use_qk_norm": (False,), "norm_topk_prob": (True,), "attention_bias": (False,)},
}


def read_huggingface(file: Path, said: str) -> HuggingFaceModel:
    """A Qwen3-MoE or Mixtral `config.json`.

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

    def refuse(key: str, value: Any, takes: str) -> ConfigError:
        return ConfigError(f"{key}={show(value)}: {takes} ({file})")

    def one_of(name: str, said: dict[str, Any]) -> None:
        """A value that may stand in several places, and must be the same in all."""
        found = {key: value for key, value in said.items() if value is not None}
        for key, value in found.items():
            first = next(iter(found))
            if value != found[first]:
                raise refuse(key, value, f"only {show(found[first])}, which {first} says")
            model[name] = value

    rest = {key: value for key, value in raw.items() if key not in _BOOKKEEPING}
    bases = {"rope_theta": rest.pop("rope_theta", None)}
    for name in ("rope_parameters", "rope_scaling"):  # of transformers 5 and 4
        rope = rest.pop(name, None)
        if not isinstance(rope, dict | None):
            raise refuse(name, rope, "only null, or a mapping with rope_type=default")
        for key, value in (rope or {}).items():
            if key == "rope_theta":
                bases[f"{name}.{key}"] = value
            elif (key, value) not in (("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1)):
                raise refuse(f"{name}.{key}", value, "only rope_type=default")
    one_of("rope_theta", bases)
    window = rest.pop("sliding_window", None)
    slides = rest.pop("use_sliding_window", False)
    if (slides or kind == "mixtral") and window is not None:  # Mixtral does not ask for the switch
        raise refuse("sliding_window", window, "only null; attention here always sees the whole sequence")
    layers = rest.pop("layer_types", None) or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise refuse("layer_types", layers, "only full_attention")
    balance = {}
    if "router_aux_loss_coef" in rest:
        balance["balance.router_aux_loss_coef"] = rest.pop("router_aux_loss_coef")
    if noise := rest.pop("router_jitter_noise", None):  # Mixtral's experts see it too, Qwen3-MoE has none
        raise refuse("router_jitter_noise", noise, "only 0; balance.router_jitter is noise for the router alone")
    one_of("num_experts", {key: rest.pop(key, None) for key in ("num_local_experts", "num_experts")})
    renamed = {key: key for key in (*_COPIED, *(_QWEN3_ONLY if kind == "qwen3_moe" else ()))}
    if kind == "mixtral":
        renamed["intermediate_size"] = "moe_intermediate_size"
    fixed = _FIXED[kind]
    lacking = [key for key in rest if key not in fixed and key not in renamed]
    if lacking:
        others = f" (and so {', '.join(lacking[1:])})" if lacking[1:] else ""
        raise refuse(lacking[0], rest[lacking[0]], f"unknown key in a {kind} model{others}")
    for key, value in rest.items():
        if key in fixed and value not in fixed[key]:
            raise refuse(key, value, f"only {show(fixed[key][0])}")
        if key in renamed:
            model[renamed[key]] = [] if key == "mlp_only_layers" and value is None else value
    for key in (*_NEEDED, "moe_intermediate_size", "rope_theta"):
        if key not in model:
            raise ConfigError(f"{said}: {file} has no {key}")
    weights = sorted({found.name for pattern in _WEIGHTS for found in file.parent.glob(pattern)})
    ignored = sorted(_BOOKKEEPING.intersection(raw) - {"model_type"})
    return HuggingFaceModel({f"model.{key}": value for key, value in model.items()}, balance, ignored, weights)


def pretrained_config(folder: Path, said: str) -> HuggingFaceModel:
    """The `config.json` of a folder whose weights are to be read. Raises ConfigError as `read_huggingface` does."""
    found = read_huggingface(folder / "config.json", said)
    if "quantization_config" in found.ignored:
        raise ConfigError(f"{said}: its weights are quantised (quantization_config); take the bf16, fp16 or fp32 ones")
    return found


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer beside a model."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def model_of(found: HuggingFaceModel) -> ModelConfig:
    """The model a `config.json` describes. Raises ValueError (pydantic's) for values that no model has."""
    return ModelConfig.model_validate({key.removeprefix("model."): value for key, value in found.model.items()})


def architecture_differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """`key=value instead of value` for all in which two models do not compute the same from the same weights.

    How it is computed, dropout and initial weights are not of the architecture.
    """
    before, after = _architecture(other), _architecture(one)
    return [
        f"{key}={show(after[key])} instead of {show(before.get(key))}" for key in after if after[key] != before.get(key)
    ]


def _architecture(model: ModelConfig) -> dict[str, Any]:
    values = model.model_dump(mode="json")
    for key in ("from_pretrained", "attn_implementation", "attention_dropout", "initializer_range"):
        del values[key]
    values |= {"num_key_value_heads": model.kv_heads, "head_dim": model.head_size}
    values["expert"] = values["expert"].removesuffix("_loop")
    if len(model.moe_layers) == model.num_hidden_layers:
        del values["intermediate_size"]
    if model.n_group == 1:
        del values["topk_group"]
    return values
