"""From a YAML file and a few overrides to a `Config`, with one clear line for everything that is wrong.

The way through: `read_yaml` (text to plain values) -> `_Reading` (inheritance, other people's spellings,
every key to its one full name `section.key`) -> pydantic (types, ranges, combinations) -> `_reworded` (its
errors in one line). There are exactly two levels, so merging happens on a flat dict of full names.
Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from moe_dist.config import Config, Section

MAX_BYTES = 1_000_000
MAX_NODES = 10_000
MAX_FILES = 100

SECTIONS: dict[str, type[Section]] = {}
for _name, _field in Config.model_fields.items():
    assert isinstance(_field.annotation, type)
    assert issubclass(_field.annotation, Section)
    SECTIONS[_name] = _field.annotation
FIELDS = {f"{name}.{key}": field for name, cls in SECTIONS.items() for key, field in cls.model_fields.items()}
# Keys are unique over all sections, so a bare key names its full one; a test holds config.py to that.
HOMES = {full.partition(".")[2]: full for full in FIELDS}
# Too general to follow out of another section: `model.name` is not the dataset's name.
GENERAL = {"limit", "name", "path", "source", "split"}
# Sections of other trainers' files. Their keys go where they belong, by name.
OTHER_SECTIONS = {"training", "load_balancing", "moe", "validation", "advanced", "distributed", "logging"}
ALIASES = {
    "experts_per_token": "model.num_experts_per_tok",
    "top_k": "model.num_experts_per_tok",
    "num_layers": "model.num_hidden_layers",
    "num_local_experts": "model.num_experts",
    "seq_len": "data.max_seq_length",
    "max_length": "data.max_seq_length",
    "expert_parallel_size": "parallel.ep_size",
    "expert_model_parallel_size": "parallel.ep_size",
    "autoep_size": "parallel.ep_size",
    "ep": "parallel.ep_size",
    "pipeline_model_parallel_size": "parallel.pp_size",
    "pipeline_parallel_size": "parallel.pp_size",
    "aux_loss_coef": "balance.router_aux_loss_coef",
    "auxiliary_loss_weight": "balance.router_aux_loss_coef",
    "load_balance_loss_coef": "balance.router_aux_loss_coef",
    "loss_coef": "balance.router_aux_loss_coef",
    "moe_aux_loss_coef": "balance.router_aux_loss_coef",
    "moe_aux_loss_coeff": "balance.router_aux_loss_coef",
    "moe_z_loss_coeff": "balance.router_z_loss_coef",
    "z_loss_coef": "balance.router_z_loss_coef",
    "lr": "optimizer.learning_rate",
    "min_lr": "optimizer.min_learning_rate",
    "batch_size": "train.per_device_train_batch_size",
    "num_epochs": "train.num_train_epochs",
    "ddp_timeout": "launch.timeout",
    "ddp_backend": "launch.backend",
    "resume_from_checkpoint": "checkpoint.resume",
}
ALWAYS_ON = {"monitor_expert_usage", "log_expert_metrics"}


class ConfigError(ValueError):
    """Something a person can mend in a configuration: one line with key, value and what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def show(value: Any) -> str:
    """A value as a person wrote it in YAML, more or less, and not longer than a line can bear."""
    plain = isinstance(value, bool) or value is None
    text = json.dumps(value) if plain else str(value) if isinstance(value, (int, float)) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def allowed(kind: Any, limits: Sequence[Any] = ()) -> str:
    """What a field of this type takes, in words: `a whole number above 0`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = [
            m for extra in inner[1:] for m in (extra.metadata if isinstance(extra, FieldInfo) else [extra])
        ]
        return allowed(inner[0], found)
    if origin is Literal:
        choices = ", ".join(value if isinstance(value, str) else show(value) for value in inner)
        return f"one of {choices}" if len(inner) > 1 else f"only {choices}"
    if origin in (Union, UnionType):
        return " or ".join("null" if arg is type(None) else allowed(arg) for arg in inner)
    if origin is list:
        return f"a list, each entry {allowed(inner[0])}"
    words = {bool: "true or false", str: "text", Path: "a path", int: "a whole number", float: "a number"}[
        kind
    ]
    bound = {name: getattr(m, name) for m in limits for name in ("gt", "ge", "lt", "le") if hasattr(m, name)}
    low = f"above {bound['gt']:g}" if "gt" in bound else f"{bound['ge']:g} or more" if "ge" in bound else ""
    high = f"below {bound['lt']:g}" if "lt" in bound else f"at most {bound['le']:g}" if "le" in bound else ""
    limit = " and ".join(part for part in (low, high) if part)
    return f"{words}, {limit}" if limit[:1].isdigit() or limit[:1] == "-" else f"{words} {limit}".rstrip()


def _takes(key: str) -> str:
    """`allowed` for a full key; where there is no choice, the reason, which is in the docstring."""
    field = FIELDS[key]
    words = allowed(field.annotation, field.metadata)
    return f"{words} ({' '.join((field.description or '').split())})" if words.startswith("only ") else words


# ------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2: 1e-4 is a number, yes and on are words, 010 is ten, 12:30:00 and 2026-11-21 are text."""


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what `_Loader` would otherwise read as something else than text."""


_MERGE = "tag:yaml.org,2002:merge"
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in (
        ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
        ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
        ("int", r"(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
        (
            "float",
            r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?$",
            list("-+.0123456789"),
        ),
        ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
        ("merge", r"<<$", ["<"]),
    ):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 0 if text[:2] in ("0x", "0o") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _weigh(node: yaml.Node, seen: dict[int, int | None]) -> int:
    """Values under a node, aliases written out; raises ConfigError for loops, bombs and repeated keys."""
    if id(node) in seen:
        weight = seen[id(node)]
        if weight is None:
            raise ConfigError(f"line {node.start_mark.line + 1}: an alias that refers to itself")
        return weight
    seen[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {line}: a key that is a list or a mapping; allowed: text")
            if key.value in lines and key.tag != _MERGE:
                raise ConfigError(
                    f"line {line}: key {key.value!r} again, first on line {lines[key.value]}; allowed: once"
                )
            lines[key.value] = line
            children += [key, value]
    weight = 1 + sum(_weigh(child, seen) for child in children)
    if weight > MAX_NODES:
        raise ConfigError(
            f"line {node.start_mark.line + 1}: over {MAX_NODES:,} values once aliases are written out"
        )
    seen[id(node)] = weight
    return weight


def parse_yaml(text: str) -> Any:
    """Plain values from one YAML document; raises ConfigError beginning with `line N: ` for anything else."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"line {mark.line + 1 if mark else 1}: not valid YAML: {what}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"line 1: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError("line 1: nested too deep") from None
    except ConfigError:
        raise
    except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:  # explicit tags
        raise ConfigError(f"line 1: not valid YAML: {error}") from None


def _read_text(path: Path, said: str, pattern: str) -> str:
    """A small UTF-8 file; `said` begins the error and `pattern` finds the files it may have been instead."""
    try:
        if path.is_dir():
            inside = ", ".join(sorted(file.name for file in path.glob(pattern))[:5])
            raise ConfigError(f"{said}: a folder; name a file in it ({inside or f'there is no {pattern}'})")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ConfigError(f"{said}: no such file, and no folder {path.parent}") from None
        names = sorted(file.name for file in path.parent.glob(pattern))
        near = difflib.get_close_matches(path.name, names, 3, 0.4) or names[:5]
        hint = f"nearest: {', '.join(near)}" if near else f"there is no {pattern} in that folder"
        raise ConfigError(f"{said}: no such file; {hint}") from None
    except OSError as error:
        raise ConfigError(f"{said}: {error.strerror or error}") from None
    except ConfigError:
        raise
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"{said}: {error}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{said}: over {MAX_BYTES:,} bytes, which is no configuration")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{said}: not UTF-8 text (byte {error.start})") from None


def read_yaml(path: Path, said: str = "") -> dict[str, Any]:
    """The mapping in a YAML file, parsed but not yet understood; raises ConfigError with file and line."""
    text = _read_text(path, said or str(path), "*.y*ml")
    try:
        raw = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}:{str(error).removeprefix('line ')}") from None
    if not isinstance(raw, dict):
        what = "an empty file" if raw is None else f"{show(raw)} instead of a mapping"
        raise ConfigError(f"{path}: {what}; allowed: sections with keys, such as `train:` and `  seed: 42`")
    return raw


# ----------------------------------------------------------------------------------- Hugging Face config.json


def _words(text: str) -> list[str]:
    return text.split()


_COPIED = _words(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "num_experts_per_tok norm_topk_prob max_position_embeddings rms_norm_eps attention_dropout "
    "tie_word_embeddings initializer_range"
)
_QWEN3_ONLY = _words("intermediate_size moe_intermediate_size decoder_sparse_step mlp_only_layers")
_NEEDED = _words(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_experts num_experts_per_tok"
)
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
# Keys this model can only have one way (attention_bias there means o_proj too, which has none here).
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "qkv_bias": (False,),
    "use_qk_norm": (True,),
    "shared_expert_intermediate_size": (0, None),
    "partial_rotary_factor": (1, None),
}


def read_huggingface(file: Path, said: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A Qwen3-MoE or Mixtral `config.json`: the model's keys, and balance defaults a person may override.

    Raises ConfigError for another model_type and for every key whose meaning this model does not have.
    """
    text = _read_text(file, said, "*.json")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(raw, dict) or str(raw.get("model_type")) not in _DEFAULTS:
        kind = raw.get("model_type") if isinstance(raw, dict) else None
        raise ConfigError(
            f"{said}: model_type={show(kind)} ({file}); allowed: {', '.join(sorted(_DEFAULTS))}"
        )
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


# -------------------------------------------------------------------------------------- names and inheritance


def _unknown(spelling: str, value: Any, origin: str) -> ConfigError:
    """The error for a key nobody knows, with the nearest that somebody does."""
    section, _, leaf = spelling.rpartition(".")
    known = {**ALIASES, **HOMES}
    near = difflib.get_close_matches(leaf, known, 1, 0.6)
    if near:
        hint = f"nearest: {known[near[0]]}"
    elif section in SECTIONS:
        hint = f"allowed in {section}: {', '.join(SECTIONS[section].model_fields)}"
    else:
        hint = f"allowed: the sections {', '.join(SECTIONS)} and their keys"
    return ConfigError(f"{spelling}={show(value)}: unknown key; {hint} ({origin})")


def _spellings(raw: Mapping[Any, Any], origin: str) -> Iterator[tuple[str, Any]]:
    """`section.key` or `key`, as written, with its value."""
    for name, content in raw.items():
        if name in SECTIONS or name in OTHER_SECTIONS:
            if not isinstance(content, dict | None):
                raise ConfigError(
                    f"{name}={show(content)}: a section, with its keys indented under it ({origin})"
                )
            yield from ((f"{name}.{key}", value) for key, value in (content or {}).items())
        elif isinstance(content, dict):
            sections = [*SECTIONS, *OTHER_SECTIONS]
            near = difflib.get_close_matches(str(name), sections, 1, 0.6)
            hint = f"nearest: {near[0]}; " if near else ""
            raise ConfigError(f"{name}: unknown section; {hint}allowed: {', '.join(SECTIONS)} ({origin})")
        else:
            yield str(name), content


class _Reading:
    """One call of `load_config`: values by full key, and who said each."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.balance_defaults: dict[str, Any] = {}
        self._notice = notice
        self._noticed: set[str] = set()
        self._files = 0

    def notice(self, text: str) -> None:
        if text not in self._noticed:
            self._noticed.add(text)
            self._notice(text)

    def file(self, path: Path, said: str = "", stack: tuple[Path, ...] = ()) -> None:
        """Add a file's values, after those of the files it is based on."""
        raw = read_yaml(path, said)
        place = path.resolve()
        if place in stack:
            circle = " -> ".join(file.name for file in (*stack[stack.index(place) :], place))
            raise ConfigError(f"{said}: files based on each other in a circle ({circle}); allowed: a chain")
        self._files += 1
        if self._files > MAX_FILES:
            raise ConfigError(f"{said}: over {MAX_FILES} base files")
        base = raw.pop("base", None)
        for name in base if isinstance(base, list) else [] if base is None else [base]:
            if not isinstance(name, str):
                raise ConfigError(f"base={show(base)}: the path of a YAML file, or a list of them ({path})")
            self.file(path.parent / os.path.expanduser(name), f"base={show(name)} ({path})", (*stack, place))
        self.layer(raw, str(path), path.parent)

    def layer(self, raw: Mapping[Any, Any], origin: str, folder: Path) -> None:
        """Add what one file or the command line says, over what is there."""
        said: dict[str, tuple[str, Any]] = {}
        for spelling, value in _spellings(raw, origin):
            for key, meant in self.place(spelling, value, origin):
                if key in said and said[key][1] != meant:
                    first, other = said[key]
                    both = f"{first}={show(other)} and {spelling}={show(value)}"
                    raise ConfigError(f"{both}: both mean {key}; allowed: one value ({origin})")
                said[key] = (spelling, meant)
        if (source := said.pop("model.from", ("", None))[1]) is not None:
            if not isinstance(source, str):
                raise ConfigError(
                    f"model.from={show(source)}: a config.json, or the folder it is in ({origin})"
                )
            file = folder / os.path.expanduser(source)
            file = file / "config.json" if file.is_dir() else file
            model, self.balance_defaults = read_huggingface(file, f"model.from={show(source)}")
            self.values |= model
            self.origins |= dict.fromkeys(model, str(file))
        self.values |= {key: value for key, (_, value) in said.items()}
        self.origins |= dict.fromkeys(said, origin)

    def place(self, spelling: str, value: Any, origin: str) -> list[tuple[str, Any]]:
        """The full keys and values a written key stands for; a notice where they differ from it."""
        section, _, leaf = spelling.rpartition(".")
        if spelling == "model.from":
            return [(spelling, value)]
        if leaf in ALWAYS_ON:
            if value is not True:
                raise ConfigError(
                    f"{spelling}={show(value)}: only true; expert utilisation is always recorded ({origin})"
                )
            self.notice(f"{spelling} is not needed: expert utilisation is always recorded")
            return []
        if leaf == "mixed_precision":
            flags = {"bf16": ("bf16", True), "fp16": ("fp16", True), "no": ("bf16", False)}
            word = "no" if value in (None, False) else str(value)
            if word not in flags:
                raise ConfigError(f"{spelling}={show(value)}: one of bf16, no ({origin})")
            flag, on = flags[word]
            self.notice(f"{spelling}={word} is read as train.{flag}={show(on)}")
            return [(f"train.{flag}", on)]
        if spelling in FIELDS:
            key = spelling
        elif leaf in ALIASES:
            key = ALIASES[leaf]
        elif leaf in HOMES and not (section and leaf in GENERAL):
            key = HOMES[leaf]
        else:
            raise _unknown(spelling, value, origin)
        meant = value
        if key == "optimizer.warmup_steps" and isinstance(value, float) and 0 < value < 1:
            key = "optimizer.warmup_ratio"
        elif key == "model.attn_implementation" and value in ("flash_attention_2", "flash_attention_3"):
            meant = "sdpa"
        elif leaf == "resume_from_checkpoint" and isinstance(value, bool | None):
            meant = "auto" if value else "never"
        if meant is not value:
            self.notice(f"{spelling}={show(value)} is read as {key}={meant}")
        elif key != spelling:
            self.notice(f"{spelling} is read as {key}")
        return [(key, meant)]

    def check_bools(self) -> None:
        """pydantic reads 'yes' as true, true as 1 and 0 as false; whoever wrote that meant something else."""
        for key, value in self.values.items():
            kind = FIELDS[key].annotation
            words = allowed(kind)
            for entry in value if isinstance(value, list) else [value]:
                wants_bool = kind is bool or words in ("only true", "only false")
                wants_number = "number" in words or words.removeprefix("only ").isdigit()
                if wants_number if isinstance(entry, bool) else wants_bool:
                    raise ConfigError(f"{key}={show(value)}: {_takes(key)} ({self.origins[key]})")


def _override_tree(overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """`a.b=c`, `--a.b=c` and the pair `--a.b`, `c`, each as the nested mapping a file would hold."""
    items = iter(overrides)
    for item in items:
        name, equals, text = item.removeprefix("--").partition("=")
        if not equals and not item.startswith("--"):
            raise ConfigError(f"{item!r}: not an override; allowed: section.key=value or --section.key value")
        if not equals:
            following = next(items, "--")
            if following.startswith("--"):
                raise ConfigError(f"{item!r}: an override without a value; allowed: --section.key value")
            text = following
        name = name.strip().replace("-", "_")
        if name == "base" or not all(name.split(".")):
            raise ConfigError(f"{item!r}: not a key; allowed: section.key=value (`base` only inside a file)")
        try:
            value = parse_yaml(text)
        except ConfigError as error:
            # *.txt would be an alias in YAML: what does not begin a list or a mapping is taken as text.
            if text.lstrip()[:1] in ("[", "{"):
                raise ConfigError(
                    f"{name}={text!r}: {str(error).partition(': ')[2]} (command line)"
                ) from None
            value = text
        for part in reversed(name.split(".")):
            value = {part: value}
        yield value


def _reworded(error: ValidationError, reading: _Reading, origin: str) -> ConfigError:
    """pydantic's findings in one line: the first, and how many more keys are wrong."""
    found = error.errors()
    first, location = found[0], found[0]["loc"]
    key = ".".join(str(part) for part in location[:2])
    if key in FIELDS:
        origin = reading.origins.get(key, origin)
        text = f"{key}={show(reading.values.get(key))}: {_takes(key)}"
    else:
        text = str(first.get("ctx", {}).get("error", first["msg"]))
        if key in SECTIONS and not text.startswith(f"{key}."):
            text = f"{key}.{text}"
        origin = reading.origins.get(re.split("[=:]", text)[0], origin)
    more = len({item["loc"][:2] for item in found}) - 1
    return ConfigError(f"{text} ({origin}){f' (and {more} more)' if more else ''}")


def _print_notice(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def load_config(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    notice: Callable[[str], None] = _print_notice,
) -> Config:
    """Read a run file, after the files it is based on, then the overrides.

    `notice` gets one line for each key that was understood under another name than its own.
    Raises ConfigError, one line, for anything wrong.
    """
    file = Path(os.path.expanduser(path))
    reading = _Reading(notice)
    reading.file(file)
    return _validated(reading, overrides, str(file))


def load_mapping(
    tree: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    notice: Callable[[str], None] = _print_notice,
) -> Config:
    """A configuration from Python: what a run file would hold, as a mapping. Errors as `load_config`."""
    reading = _Reading(notice)
    reading.layer(tree, "Python", Path())
    return _validated(reading, overrides, "Python")


def _validated(reading: _Reading, overrides: Sequence[str], origin: str) -> Config:
    for tree in _override_tree(overrides):
        reading.layer(tree, "command line", Path())
    reading.values = reading.balance_defaults | reading.values
    reading.origins = dict.fromkeys(reading.values, origin) | reading.origins
    reading.check_bools()
    nested: dict[str, dict[str, Any]] = {}
    for key, value in reading.values.items():
        section, _, leaf = key.partition(".")
        nested.setdefault(section, {})[leaf] = value
    try:
        return Config.model_validate(nested)
    except ValidationError as error:
        raise _reworded(error, reading, origin) from None


# ----------------------------------------------------------------------------------------------- the way back


def flatten(config: Config) -> dict[str, Any]:
    """Every full key with its value, as plain data, in the order of config.py."""
    tree = config.model_dump(mode="json")
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def dump_config(config: Config) -> str:
    """All keys with their values as YAML that `load_config` reads back as an equal Config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=110)


def config_difference(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """(full key, value in a, value in b) for every key whose values differ."""
    one, other = flatten(a), flatten(b)
    return [(key, one[key], other[key]) for key in one if one[key] != other[key]]


def config_reference() -> str:
    """The reference manual: one Markdown table of all keys, made from config.py."""
    lines = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    defaults = flatten(Config())
    for section, cls in SECTIONS.items():
        lines.append(f"| **{section}** | | | **{' '.join((inspect.getdoc(cls) or '').split())}** |")
        for leaf, field in cls.model_fields.items():
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            words = allowed(field.annotation, field.metadata).replace("|", "\\|")
            lines.append(
                f"| `{section}.{leaf}` | {words} | `{show(defaults[f'{section}.{leaf}'])}` | {meaning} |"
            )
    return "\n".join(lines) + "\n"
