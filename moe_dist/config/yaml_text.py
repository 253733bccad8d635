"""YAML, version 1.2, to plain values: what a person wrote is what is read, and nothing can run or explode.

`Dumper` is the way back; the two share one table of what text without quotes means.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from moe_dist.config.text_files import read_text
from moe_dist.config.wording import ConfigError, show

MAX_NODES = 10_000


class _Loader(yaml.SafeLoader):
    """YAML 1.2: 1e-4 is a number, yes and on are words, 010 is ten, 12:30:00 and 2026-11-21 are text."""


class Dumper(yaml.SafeDumper):
    """Quotes exactly what `_Loader` would otherwise read as something else than text."""


_MERGE = "tag:yaml.org,2002:merge"
for _class in (_Loader, Dumper):
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
        raise ConfigError(f"line {node.start_mark.line + 1}: over {MAX_NODES:,} values once aliases are written out")
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


def read_yaml(path: Path, said: str = "") -> dict[str, Any]:
    """The mapping in a YAML file, parsed but not yet understood; raises ConfigError with file and line."""
    text = read_text(path, said or str(path), "*.y*ml")
    try:
        raw = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}:{str(error).removeprefix('line ')}") from None
    if not isinstance(raw, dict):
        what = "an empty file" if raw is None else f"{show(raw)} instead of a mapping"
        raise ConfigError(f"{path}: {what}; allowed: sections with keys, such as `train:` and `  seed: 42`")
    return raw
