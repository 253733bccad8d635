"""The secret that all machines of a job know, and nobody else. Imports no torch."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from moe_dist.config import ConfigError

SECRET, SECRET_FILE = "MOE_DIST_SECRET", "MOE_DIST_SECRET_FILE"
"""The secret itself, or a file that holds it: made when it is missing, for machines that share a folder."""
_SHORTEST = 16


def job_secret(environ: Mapping[str, str] = os.environ) -> str:
    """The secret of MOE_DIST_SECRET, or of a file that all machines see: by default in the home folder.

    Raises ConfigError when there is none, when it is too short, and when everybody on the machine can read it.
    """
    if SECRET in environ:
        return _long_enough(environ[SECRET], SECRET)
    home = environ.get("XDG_CONFIG_HOME") or "~/.config"
    path = Path(environ.get(SECRET_FILE) or f"{home}/moe-dist/secret").expanduser()
    try:
        if not path.exists():
            _make(path)
        if path.stat().st_mode & 0o007:
            raise ConfigError(f"{path}: everybody can read this secret: chmod 600 {path}")
        return _long_enough(path.read_text().strip(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: no secret for the machines of this run: {error}; set {SECRET} to a random text, the same on "
            "every machine"
        ) from None


def _long_enough(text: str, where: str) -> str:
    if len(text) < _SHORTEST:
        raise ConfigError(f"{where}: a secret of {len(text)} characters; at least {_SHORTEST} (openssl rand -hex 32)")
    return text


def _make(path: Path) -> None:
    """Whoever comes first; the file is whole as soon as it is there."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    own = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with open(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    try:
        with suppress(FileExistsError):
            os.link(own, path)
    finally:
        own.unlink()
