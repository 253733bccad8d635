"""A Hugging Face `config.json` as model keys: what it says is understood exactly, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from moe_dist.config.families import Family, families
from moe_dist.config.families.base import Refuse, same
from moe_dist.config.sections.model import ModelConfig
from moe_dist.config.sections.rope import YARN_BOUNDS
from moe_dist.config.text_files import read_text
from moe_dist.config.wording import ConfigError, show

# Say nothing about the arithmetic of the model in training.
_BOOKKEEPING = same(
    "_name_or_path _attn_implementation _attn_implementation_autoset architectures attn_implementation auto_map "
    "bos_token_id chunk_size_feed_forward dtype eos_token_id finetuning_task id2label is_decoder "
    "is_encoder_decoder label2id model_type output_attentions output_hidden_states "
    "output_router_logits pad_token_id prefix problem_type quantization_config return_dict sep_token_id "
    "task_specific_params tokenizer_class torch_dtype torchscript transformers_version unsloth_fixed "
    "unsloth_version use_bfloat16 use_cache"
).keys()
MODEL_TYPE = "moe_dist"
"""In the config.json of a folder that has our own names and layout."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "consolidated*.pt*")


class HuggingFaceModel(NamedTuple):
    """What a `config.json` says.

    `family`: whose it is. `model`: the whole architecture, by full key. `balance`: defaults that a person may override.
    `ignored`: keys that say nothing about the arithmetic. `weights`: names of files with weights beside it.
    """

    family: Family
    model: dict[str, Any]
    balance: dict[str, Any]
    ignored: list[str]
    weights: list[str]


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Their names -> ours."""


def read_huggingface(file: Path, said: str) -> HuggingFaceModel:
    """The `config.json` of a family that is known.

    Raises ConfigError for another model_type and for every key whose meaning this model does not have.
    """
    text = read_text(file, said, "*.json")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind == MODEL_TYPE:
        raise ConfigError(
            f"{said}: a model under the names of moe-dist ({file}): moe-dist checkpoint import {file.parent} "
            "--output RUN makes a run folder that starts from it"
        )
    family = families().get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ConfigError(f"{said}: model_type={show(kind)} ({file}); allowed: {', '.join(sorted(families()))}")
    model, balance = _model(family, raw, f" ({file})")
    for key in family.needed:
        if key not in model:
            raise ConfigError(f"{said}: {file} has no {key}")
    weights = sorted({found.name for pattern in _WEIGHTS for found in file.parent.glob(pattern)})
    ignored = sorted({*_BOOKKEEPING, *family.ignored}.intersection(raw) - {"model_type"})
    return HuggingFaceModel(family, {f"model.{key}": value for key, value in model.items()}, balance, ignored, weights)


def _model(family: Family, raw: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our keys of `model`, and of `balance` by full key. Raises ConfigError for what is not understood."""

    def refuse(key: str, value: Any, takes: str) -> ConfigError:
        return ConfigError(f"{key}={show(value)}: {takes}{where}")

    rest = {key: value for key, value in raw.items() if key not in _BOOKKEEPING and key not in family.ignored}
    model = {**family.always, **family.defaults, "model_type": family.model_type}
    _read_rope(rest, model, refuse)
    balance = {}
    if "router_aux_loss_coef" in rest:
        balance["balance.router_aux_loss_coef"] = rest.pop("router_aux_loss_coef")
    if "num_experts" in family.keys.values():  # by either name, whichever the family has
        names = dict.fromkeys((*_EXPERTS, *(key for key, ours in family.keys.items() if ours == "num_experts")))
        if (number := _agreed({key: rest.pop(key, None) for key in names}, refuse)) is not None:
            model["num_experts"] = number
    for key, ours in family.keys.items():
        if key in rest and key not in _EXPERTS:
            model[ours] = rest.pop(key)
    act = model.get("hidden_act", "silu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise refuse("hidden_act", act, f"one of {', '.join(ACTIVATIONS)}")
    model["hidden_act"] = ACTIVATIONS[act]
    if noise := rest.get("router_jitter_noise"):
        raise refuse("router_jitter_noise", noise, "only 0; balance.router_jitter is noise for the router alone")
    rest.pop("router_jitter_noise", None)
    try:
        family.read(rest, model, refuse)
    except TypeError as error:  # a number that is text, or the like
        raise ConfigError(
            f"model_type={family.model_type}: a value of another type than it should be: {error}{where}"
        ) from None
    for key, values in family.only.items():
        if key in rest and (value := rest.pop(key)) not in values:
            raise refuse(key, value, f"only {show(values[0])}")
    unknown = [key for key, value in rest.items() if value is not None]
    if unknown:
        others = f" (and so {', '.join(unknown[1:])})" if unknown[1:] else ""
        raise refuse(unknown[0], rest[unknown[0]], f"unknown key in a {family.model_type} model{others}")
    return model, balance


_EXPERTS = ("num_local_experts", "num_experts")


def _agreed(said: dict[str, Any], refuse: Refuse) -> Any:
    """A value that may stand in several places, and must be the same in all; None when it is in none."""
    found = [(key, value) for key, value in said.items() if value is not None]
    for key, value in found[1:]:
        if value != found[0][1]:
            raise refuse(key, value, f"only {show(found[0][1])}, which {found[0][0]} says")
    return found[0][1] if found else None


def _read_rope(rest: dict[str, Any], model: dict[str, Any], refuse: Refuse) -> None:
    """Base, stretching and the part of a head that is turned, in the words of transformers 5 and 4."""
    bases, parts = {"rope_theta": rest.pop("rope_theta", None)}, {}
    if "partial_rotary_factor" in rest:
        parts["partial_rotary_factor"] = rest["partial_rotary_factor"]
    scalings = {}
    length = rest.pop("original_max_position_embeddings", None)
    for name in ("rope_parameters", "rope_scaling"):
        rope = rest.pop(name, None)
        if not isinstance(rope, dict | None):
            raise refuse(name, rope, "only null, or a mapping with a rope_type")
        values = dict(rope or {})
        bases[f"{name}.rope_theta"] = values.pop("rope_theta", None)
        parts[f"{name}.partial_rotary_factor"] = values.pop("partial_rotary_factor", None)
        kind = _agreed({f"{name}.{key}": values.pop(key, None) for key in ("rope_type", "type")}, refuse)
        if kind in (None, "default"):
            for key, value in values.items():
                raise refuse(f"{name}.{key}", value, "only with a rope_type that has it")
            continue
        if length is not None:
            values["original_max_position_embeddings"] = length
        scalings[name] = {"rope_type": kind, **values}
    if (base := _agreed(bases, refuse)) is not None:
        model["rope_theta"] = base
    if (part := _agreed(parts, refuse)) is not None:
        rest["partial_rotary_factor"] = part
    model["rope_scaling"] = _agreed(scalings, refuse)


def huggingface_values(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The contents of a `config.json` of that family, as well as it can say what the model is."""
    values = {theirs: getattr(config, ours) for theirs, ours in family.keys.items()}
    if "num_key_value_heads" in values:
        values["num_key_value_heads"] = config.kv_heads
    if "head_dim" in values:
        values["head_dim"] = config.head_size
    if "hidden_act" in values:
        values["hidden_act"] = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.hidden_act]
    scaling = None if config.rope_scaling is None else dict(config.rope_scaling)
    rope = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    # The last two are what transformers 4 and vLLM look for: without them they take their own default, silently.
    values |= {"rope_parameters": rope, "rope_scaling": scaling, "rope_theta": config.rope_theta}
    family.write(config, values)
    return values | {"model_type": family.model_type, "architectures": [family.architecture]}


def differences(family: Family, config: ModelConfig) -> list[str]:
    """What keeps a family from being this model: what it says of it, read again, says something else.

    Raises ValueError where what it says cannot be read: then it is far from it.
    """
    if not config.moe_layers and family.always.get("num_experts") != 0:
        raise ConfigError(f"{family.model_type} has layers with experts")
    model, _ = _model(family, huggingface_values(family, config), "")
    return architecture_differences(ModelConfig.model_validate(model), config)


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
    for key in ("from_pretrained", "model_type", "attn_implementation", "attention_dropout", "initializer_range"):
        del values[key]
    values |= {"num_key_value_heads": model.kv_heads, "head_dim": model.head_size}
    values["expert"] = values["expert"].removesuffix("_loop")
    if model.rope_scaling is not None and model.rope_scaling["rope_type"] == "yarn":
        values["rope_scaling"] = {**YARN_BOUNDS, **model.rope_scaling}
    for key in ("decoder_sparse_step", "mlp_only_layers", "sliding_window", "layer_types"):
        del values[key]
    layers = range(model.num_hidden_layers)
    values |= {"layers with experts": model.moe_layers, "windows": [model.window(layer) for layer in layers]}
    if len(model.moe_layers) == model.num_hidden_layers:
        del values["intermediate_size"]
    if not model.moe_layers:
        for key in _OF_EXPERTS:
            del values[key]
    if model.n_group == 1:
        values.pop("topk_group", None)
    if model.kv_lora_rank is None:
        for key in _OF_LATENTS:
            del values[key]
    else:
        del values["head_dim"]
    return values


_OF_EXPERTS = (
    *("moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob", "scoring_func", "n_group"),
    *("topk_group", "routed_scaling_factor", "shared_expert_intermediate_size", "shared_expert_gate"),
    *("router", "router_bias", "expert"),
)
_OF_LATENTS = ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave")
