"""Paths as people write them: `~` and `${VAR}` are expanded, everywhere and once. Imports no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

_VARIABLE = re.compile(r"\$\{([^}]*)\}")


def expand(path: str) -> str:
    """`path` with `~`, `~user` and every `${VAR}` replaced; URLs and names pass unchanged.

    Raises ValueError naming a variable that is not set, and a user who has no home.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if not os.environ.get(name):
            raise ValueError(f"the environment variable {name} is {'empty' if name in os.environ else 'not set'}")
        return os.environ[name]

    text = os.path.expanduser(_VARIABLE.sub(value, path))
    if text.startswith("~"):
        raise ValueError(f"{text.split('/')[0]}: no such user; ./{text} is a file of that name")
    return text


def plain(value: Any) -> Any:
    """The text of an `os.PathLike`, as Python programs give paths; all else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _expand_path(path: Path) -> Path:
    return Path(expand(str(path)))


PathText = Annotated[str, BeforeValidator(plain), AfterValidator(expand)]
"""A file, folder, pattern or URL, or a name that may be one: every key that holds a path has this type, or `Folder`."""
Folder = Annotated[Path, BeforeValidator(plain), AfterValidator(_expand_path)]
"""The same as a `Path`."""
PATHS = (expand, _expand_path)
"""What the values of such keys go through."""
