"""The way back: a `Config` as YAML, as flat keys, against another one; and the reference manual."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import yaml

from moe_dist.config.names import FIELDS, GROUPS, SECTIONS, meaning
from moe_dist.config.sections.base import Section
from moe_dist.config.tree import Config
from moe_dist.config.wording import allowed, show
from moe_dist.config.yaml_text import Dumper


def flatten(config: Config) -> dict[str, Any]:
    """Every full key with its value, as plain data, in the order of config.py."""
    tree = config.model_dump(mode="json")
    flat: dict[str, Any] = {}
    for key in FIELDS:
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        flat[key] = value
    return flat


def dump_config(config: Config) -> str:
    """All keys with their values as YAML that `load_config` reads back as an equal Config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, width=110)


def config_difference(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """(full key, value in a, value in b) for every key whose values differ."""
    one, other = flatten(a), flatten(b)
    return [(key, one[key], other[key]) for key in one if one[key] != other[key]]


def _in_order() -> Iterator[tuple[str, type[Section]]]:
    """Every section, each followed by its groups."""
    for section, cls in SECTIONS.items():
        yield section, cls
        yield from ((name, group) for name, group in GROUPS.items() if name.startswith(f"{section}."))


def config_reference() -> str:
    """The reference manual: one Markdown table of all keys, made from config.py."""
    lines = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    defaults = flatten(Config())
    for section, cls in _in_order():
        lines.append(f"| **{section}** | | | **{' '.join((inspect.getdoc(cls) or '').split())}** |")
        for leaf, field in cls.model_fields.items():
            if f"{section}.{leaf}" in GROUPS:
                continue
            words = allowed(field.annotation, field.metadata).replace("|", "\\|")
            says = meaning(field).replace("|", "\\|")
            default = show(defaults[f"{section}.{leaf}"])
            lines.append(f"| `{section}.{leaf}` | {words} | `{default}` | {says} |")
    return "\n".join(lines) + "\n"
