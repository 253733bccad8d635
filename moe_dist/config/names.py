"""Names: every key's one full name `section.key`, and the spellings of other trainers that mean it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic.fields import FieldInfo

from moe_dist.config.not_offered import GENERATION, instead_of, needs_nothing
from moe_dist.config.paths import PATHS
from moe_dist.config.sections.all import Sections
from moe_dist.config.sections.base import RUNS_CODE, Choice, Section
from moe_dist.config.wording import ConfigError, allowed, show

SECTIONS: dict[str, type[Section]] = {}
for _name, _field in Sections.model_fields.items():
    assert isinstance(_field.annotation, type)
    assert issubclass(_field.annotation, Section)
    SECTIONS[_name] = _field.annotation
# Keys of a section that are sections themselves, by their full name: `monitor.prometheus`.
GROUPS: dict[str, type[Section]] = {
    f"{name}.{key}": field.annotation
    for name, cls in SECTIONS.items()
    for key, field in cls.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
FIELDS = {
    f"{name}.{key}": field
    for name, cls in (SECTIONS | GROUPS).items()
    for key, field in cls.model_fields.items()
    if f"{name}.{key}" not in GROUPS
}
# Keys are unique over all sections, so a bare key names its full one; a test holds config.py to that. The keys of a
# group keep its name: `prometheus.port`.
HOMES = {full.partition(".")[2]: full for full in FIELDS}


def _limits(kind: Any, metadata: Sequence[Any] = ()) -> Iterator[Any]:
    """The functions that a value of this type goes through, and marks beside it, at any depth."""
    for limit in metadata:
        yield from _limits(None, limit.metadata) if isinstance(limit, FieldInfo) else [getattr(limit, "func", limit)]
    for inner in get_args(kind):
        yield from _limits(inner, getattr(inner, "__metadata__", ()))


_LIMITS = {key: tuple(_limits(field.annotation, field.metadata)) for key, field in FIELDS.items()}
PATH_KEYS = frozenset(key for key, limits in _LIMITS.items() if any(limit in PATHS for limit in limits))
"""Whose values are files, folders, patterns or URLs, or names that may be one."""
CODE_KEYS = frozenset(
    key for key, limits in _LIMITS.items() if any(limit is RUNS_CODE or isinstance(limit, Choice) for limit in limits)
)
"""That take a `package.module:Class` of a person's own, which then runs."""
# Too general to follow out of another section: `model.name` is not the dataset's name.
GENERAL = {"limit", "name", "path", "source", "split"}
# Sections of other trainers' files. Their keys go where they belong, by name.
OTHER_SECTIONS = {
    *("training", "load_balancing", "moe", "validation", "advanced", "distributed", "logging"),
    *("inference", "post_training"),
}
ALIASES = {
    "experts_per_token": "model.num_experts_per_tok",
    "top_k": "model.num_experts_per_tok",
    "num_layers": "model.num_hidden_layers",
    "num_local_experts": "model.num_experts",
    "model_name": "model.from_pretrained",
    "model_name_or_path": "model.from_pretrained",
    "base_model": "model.from_pretrained",
    "base_model_name_or_path": "model.from_pretrained",
    "pretrained_model_name_or_path": "model.from_pretrained",
    "seq_len": "data.max_seq_length",
    "max_length": "data.max_seq_length",
    "expert_parallel_size": "parallel.ep_size",
    "expert_model_parallel_size": "parallel.ep_size",
    "autoep_size": "parallel.ep_size",
    "ep": "parallel.ep_size",
    "pipeline_model_parallel_size": "parallel.pp_size",
    "pipeline_parallel_size": "parallel.pp_size",
    "use_cpu_offload": "parallel.cpu_offload",
    "aux_loss_coef": "balance.router_aux_loss_coef",
    "auxiliary_loss_weight": "balance.router_aux_loss_coef",
    "load_balance_loss_coef": "balance.router_aux_loss_coef",
    "loss_coef": "balance.router_aux_loss_coef",
    "moe_aux_loss_coef": "balance.router_aux_loss_coef",
    "moe_aux_loss_coeff": "balance.router_aux_loss_coef",
    "moe_z_loss_coeff": "balance.router_z_loss_coef",
    "z_loss_coef": "balance.router_z_loss_coef",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "use_rslora": "lora.rslora",
    "lr": "optimizer.learning_rate",
    "min_lr": "optimizer.min_learning_rate",
    "batch_size": "train.per_device_train_batch_size",
    "num_epochs": "train.num_train_epochs",
    "ddp_timeout": "launch.timeout",
    "ddp_backend": "launch.backend",
    "resume_from_checkpoint": "checkpoint.resume",
}


def meaning(field: FieldInfo) -> str:
    """The docstring of a field, on one line."""
    return " ".join((field.description or "").split())


def takes(key: str) -> str:
    """`allowed` for a full key; where there is no choice, the reason, which is in the docstring."""
    field = FIELDS[key]
    words = allowed(field.annotation, field.metadata)
    return f"{words} ({meaning(field)})" if words.startswith("only ") else words


def _unknown(spelling: str, value: Any, origin: str) -> ConfigError:
    """The error for a key nobody knows: what there is instead, or the nearest that somebody knows."""
    section, _, leaf = spelling.rpartition(".")
    if instead := instead_of(leaf):
        return ConfigError(f"{spelling}={show(value)}: not offered yet; there is: {instead} ({origin})")
    known = {key: f"{section}.{key}" for key in GROUPS[section].model_fields} if section in GROUPS else {}
    known = known or {**ALIASES, **HOMES}
    near = difflib.get_close_matches(leaf, known, 1, 0.6)
    if section == "inference":
        hint = f"allowed in inference: {', '.join(GENERATION)}"
    elif near:
        hint = f"nearest: {known[near[0]]}"
    elif section in SECTIONS or section in GROUPS:
        hint = f"allowed in {section}: {', '.join((SECTIONS | GROUPS)[section].model_fields)}"
    else:
        hint = f"allowed: the sections {', '.join(SECTIONS)} and their keys"
    return ConfigError(f"{spelling}={show(value)}: unknown key; {hint} ({origin})")


def _inside(name: str, value: Any, origin: str) -> Iterator[tuple[str, Any]]:
    """What a key of a section holds: its value, or the keys of a group."""
    if name not in GROUPS:
        yield name, value
    elif isinstance(value, dict | None):
        yield from ((f"{name}.{key}", inner) for key, inner in (value or {}).items())
    else:
        keys = ", ".join(f"{name}.{key}" for key in GROUPS[name].model_fields)
        raise ConfigError(f"{name}={show(value)}: a group of keys; allowed: {keys} ({origin})")


def spellings(raw: Mapping[Any, Any], origin: str) -> Iterator[tuple[str, Any]]:
    """`section.key` or `key`, as written, with its value."""
    for name, content in raw.items():
        if name in SECTIONS or name in OTHER_SECTIONS:
            if not isinstance(content, dict | None):
                raise ConfigError(f"{name}={show(content)}: a section, with its keys indented under it ({origin})")
            for key, value in (content or {}).items():
                yield from _inside(f"{name}.{key}", value, origin)
        elif (group := next((full for full in GROUPS if full.endswith(f".{name}")), None)) is not None:
            yield from _inside(group, content, origin)
        elif isinstance(content, dict) and (instead := instead_of(str(name))):
            raise ConfigError(f"{name}: not offered yet; there is: {instead} ({origin})")
        elif isinstance(content, dict):
            sections = [*SECTIONS, *OTHER_SECTIONS]
            near = difflib.get_close_matches(str(name), sections, 1, 0.6)
            hint = f"nearest: {near[0]}; " if near else ""
            raise ConfigError(f"{name}: unknown section; {hint}allowed: {', '.join(SECTIONS)} ({origin})")
        else:
            yield str(name), content


def names_a_model(spelling: str) -> bool:
    """Whether a written key takes a whole model, which replaces what was said of one before."""
    return spelling == "model.from" or _home(spelling) == "model.from_pretrained"


def _home(spelling: str) -> str | None:
    """The full key that a written one means; None where nobody knows it."""
    section, _, leaf = spelling.rpartition(".")
    if spelling in FIELDS:
        return spelling
    if spelling == "model.name":
        return "model.from_pretrained"
    if section == "inference" or (section and leaf in GENERAL):
        return None
    return ALIASES.get(leaf) or HOMES.get(leaf)


def keys_of(spelling: str, value: Any, origin: str, notice: Callable[[str], None]) -> list[tuple[str, Any]]:
    """The full keys and values a written key stands for; a notice where they differ from it."""
    leaf = spelling.rpartition(".")[2]
    if spelling == "model.from":
        return [(spelling, value)]
    try:
        if (words := needs_nothing(spelling, value)) is not None:
            notice(words)
            return []
    except ValueError as error:
        raise ConfigError(f"{spelling}={show(value)}: {error} ({origin})") from None
    if leaf == "mixed_precision":
        flags = {"bf16": ("bf16", True), "fp16": ("fp16", True), "no": ("bf16", False)}
        word = {None: "no", False: "no", True: "bf16"}.get(value) if isinstance(value, bool | None) else str(value)
        if word not in flags:
            raise ConfigError(f"{spelling}={show(value)}: one of bf16, no ({origin})")
        flag, on = flags[word]
        notice(f"{spelling}={show(value) if value is True else word} is read as train.{flag}={show(on)}")
        return [(f"train.{flag}", on)]
    if (found := _home(spelling)) is None:
        raise _unknown(spelling, value, origin)
    key = found
    meant = value
    if key == "optimizer.warmup_steps" and isinstance(value, float) and 0 < value < 1:
        key = "optimizer.warmup_ratio"
    elif key == "model.attn_implementation" and value in ("flash_attention_2", "flash_attention_3"):
        meant = "sdpa"
    elif leaf == "resume_from_checkpoint" and isinstance(value, bool | None):
        meant = "auto" if value else "never"
    if meant is not value:
        notice(f"{spelling}={show(value)} is read as {key}={meant}")
    elif key != spelling:
        notice(f"{spelling} is read as {key}")
    return [(key, meant)]
