"""The words errors are made of: the error itself, a value as it was written, and what a type allows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from moe_dist.config.paths import expand
from moe_dist.config.sections.base import Choice


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
        found = [m for extra in inner[1:] for m in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return allowed(inner[0], found)
    for limit in limits:
        if isinstance(getattr(limit, "func", None), Choice):
            return str(limit.func)
    if any(getattr(limit, "func", None) is expand for limit in limits):
        return "a path or name"
    if origin is Literal:
        choices = ", ".join(value if isinstance(value, str) else show(value) for value in inner)
        return f"one of {choices}" if len(inner) > 1 else f"only {choices}"
    if origin in (Union, UnionType):
        return " or ".join("null" if arg is type(None) else allowed(arg) for arg in inner)
    if origin is list:
        return f"a list, each entry {allowed(inner[0])}"
    if origin is dict:
        return "a mapping"
    words = {bool: "true or false", str: "text", Path: "a path", int: "a whole number", float: "a number"}[kind]
    bound = {name: getattr(m, name) for m in limits for name in ("gt", "ge", "lt", "le") if hasattr(m, name)}
    low = f"above {bound['gt']:g}" if "gt" in bound else f"{bound['ge']:g} or more" if "ge" in bound else ""
    high = f"below {bound['lt']:g}" if "lt" in bound else f"at most {bound['le']:g}" if "le" in bound else ""
    limit = " and ".join(part for part in (low, high) if part)
    return f"{words}, {limit}" if limit[:1].isdigit() or limit[:1] == "-" else f"{words} {limit}".rstrip()
