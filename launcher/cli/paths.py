"""Paths on the command line, read as those in a run file are."""

from __future__ import annotations

from moe_dist.config import ConfigError
from moe_dist.config.paths import expand


def expanded(value: str | list[str] | None) -> str | list[str] | None:
    """For typer's `callback`: a path or several with `~` and `${VAR}` expanded. Raises ConfigError."""
    try:
        return [expand(path) for path in value] if isinstance(value, list | tuple) else value and expand(value)
    except ValueError as error:
        raise ConfigError(f"{value if isinstance(value, str) else ' '.join(value or ())}: {error}") from None
