"""Which files a run's first weights came from. Imports no torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def sha256_of(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files of a folder by name; "" for one that cannot be read."""
    found = {}
    for file in files:
        try:
            with (folder / file).open("rb") as stream:
                found[file] = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            found[file] = ""
    return found


def revision_of(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache; None elsewhere."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", str(folder))
    return found[1] if found else None


def provenance(folder: Path, hashes: dict[str, str]) -> dict[str, Any]:
    """What `trainer_state.json` says of it."""
    return {"folder": str(folder), "revision": revision_of(folder), "files": hashes}


def changed(folder: Path, hashes: dict[str, str]) -> list[str]:
    """Files of the hub's cache that are not what the hub has: there a large file is called as its content is hashed."""
    names = {file: (folder / file).resolve().name for file in hashes}
    return [
        f"{file}: not what the hub has: its SHA-256 is {digest}, its name {names[file]}"
        for file, digest in hashes.items()
        if re.fullmatch(r"[0-9a-f]{64}", names[file]) and digest != names[file]
    ]
