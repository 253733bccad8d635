"""A small text file from disk, or one clear line why not and which file was perhaps meant."""

from __future__ import annotations

import difflib
from pathlib import Path

from moe_dist.config.wording import ConfigError

MAX_BYTES = 1_000_000


def read_text(path: Path, said: str, pattern: str) -> str:
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
