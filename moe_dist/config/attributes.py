"""Keys of a `Config` as its attributes, without their section and by the names of other trainers too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_dist.config.names import ALIASES, HOMES, keys_of, spellings
from moe_dist.config.reading import Reading, validated
from moe_dist.config.sections.all import Sections


def read(config: Sections, name: str) -> Any:
    """The value of key `name`. Raises AttributeError for what is no key."""
    if name == "mixed_precision":
        return "bf16" if config.train.bf16 else "no"
    key = ALIASES.get(name) or HOMES.get(name)
    if key is None:
        raise AttributeError(f"{type(config).__name__} has no section and no key {name!r}")
    section, _, leaf = key.partition(".")
    return getattr(getattr(config, section), leaf)


def write(config: Sections, name: str, value: Any) -> None:
    """Set what key `name` means. Raises ConfigError as a file would, and changes nothing then."""
    reading = Reading(lambda text: None)
    reading.layer(config.model_dump(mode="json"), "Python", Path())
    reading.changes({name: value})
    changed = validated(type(config), reading, (), "Python")
    for spelling, meant in spellings({name: value}, "Python"):
        for key, _ in keys_of(spelling, meant, "Python", lambda text: None):
            section, _, leaf = key.partition(".")
            setattr(getattr(config, section), leaf, getattr(getattr(changed, section), leaf))
