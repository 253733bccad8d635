"""A model's folder behind a URL (s3://, gs://, memory://, ...), fetched through fsspec into this host's cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moe_dist.config.host_cache import PATTERNS, WAITING, cache_folder, one_at_a_time
from moe_dist.config.wording import ConfigError

CHUNK = 2**24


def fetch(url: str, said: str, notice: Callable[[str], None]) -> Path:
    """The folder with its files: as the store says that they are now. Raises ConfigError in one line.

    Each version of the files has a folder of its own, named by their sizes, dates and hashes as far as the store tells
    them: none is ever changed under a run that reads it. A file is taken up where it was left.
    """
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    try:
        import fsspec  # type: ignore[import-untyped]

        filesystem, root = fsspec.core.url_to_fs(url)
        with one_at_a_time(url, lambda: notice(f"{said}: {WAITING}")):
            return _fetch(filesystem, str(root).rstrip("/"), url, said, notice)
    except ConfigError:
        raise
    except Exception as error:  # of fsspec and of each store's own client
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{said}: cannot be read: {why}") from error


def _fetch(filesystem: Any, root: str, url: str, said: str, notice: Callable[[str], None]) -> Path:
    filesystem.invalidate_cache()
    entries = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in filesystem.ls(root, detail=True)}
    wanted = {
        name: entry
        for name, entry in sorted(entries.items())
        if entry["type"] == "file" and any(fnmatch(name, pattern) for pattern in PATTERNS)
    }
    if "config.json" not in wanted:
        raise ConfigError(f"{said}: there is no config.json")
    identity = [[url], *([name, *_version(entry)] for name, entry in wanted.items())]
    version = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = cache_folder() / "models" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', root)[-80:].strip('-')}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    missing = {name: entry for name, entry in wanted.items() if not (folder / name).exists()}
    if missing:
        amount = sum(int(entry["size"]) for entry in missing.values()) / 1e6
        notice(f"{said}: fetching {len(missing)} files, {amount:,.1f} MB, into {folder}")
    for name, entry in missing.items():
        _fetch_file(filesystem, f"{root}/{name}", int(entry["size"]), folder / name, said)
    return folder


def _version(entry: dict[str, Any]) -> list[str]:
    """What changes when a file does."""
    keys = ("size", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
    return [str(entry[key]) for key in keys if key in entry]


def _fetch_file(filesystem: Any, path: str, size: int, target: Path, said: str) -> None:
    part = target.with_name(f"{target.name}.part")
    with part.open("ab") as file:
        while (start := file.tell()) < size:
            chunk = filesystem.cat_file(path, start=start, end=min(size, start + CHUNK))
            if not chunk:
                break
            file.write(chunk)
        if file.tell() != size:
            found = file.tell()
            file.truncate(0)
            raise ConfigError(f"{said}: {target.name}: {found} bytes instead of {size}")
        file.flush()
        os.fsync(file.fileno())
    part.rename(target)
