"""From a file, the files it is based on and a few overrides to one validated `Config`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_dist.config.reading import Admit, Reading, as_it_is, expanded, validated
from moe_dist.config.tree import Config


def _print_notice(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def load_config(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    changes: Mapping[str, Any] | None = None,
    notice: Callable[[str], None] = _print_notice,
    admit: Admit = as_it_is,
) -> Config:
    """Read a run file, after the files it is based on, then `changes` from Python, then the overrides.

    `notice` gets one line for each key that was understood under another name than its own. `admit(key, value)` sees
    every value before anything is read by it, and returns it, changed or not.
    Raises ConfigError, one line, for anything wrong.
    """
    file = Path(expanded(os.fspath(path), os.fspath(path)))
    reading = Reading(notice, admit)
    reading.file(file)
    reading.changes(changes or {})
    return validated(Config, reading, overrides, str(file))


def load_mapping(
    tree: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    changes: Mapping[str, Any] | None = None,
    notice: Callable[[str], None] = _print_notice,
    admit: Admit = as_it_is,
) -> Config:
    """A configuration from Python: what a run file would hold, as a mapping. Else as `load_config`."""
    reading = Reading(notice, admit)
    reading.layer(tree, "Python", Path())
    reading.changes(changes or {})
    return validated(Config, reading, overrides, "Python")
