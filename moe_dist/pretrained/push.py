"""An exported folder onto the Hugging Face Hub, compared with what the hub then has. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from moe_dist.config import ConfigError
from moe_dist.config.model_source import hub_problem, patiently


class Pushed(NamedTuple):
    """What the hub has now. `problems`: files there that are not the folder's."""

    commit: str
    num_files: int
    problems: list[str]


def check_token(name: str) -> None:
    """Raises ConfigError where the hub does not know the token: before hours of work, not after."""
    from huggingface_hub import HfApi

    with _in_one_line(name):
        patiently(lambda: HfApi().whoami())


def push(folder: Path, name: str, *, private: bool = False, revision: str | None = None) -> Pushed:
    """Make the model `name` on the hub, or go on with it, and upload the folder to the branch `revision`.

    A hub that is busy is asked again, and what it has already is not sent twice: neither then nor in a later call.
    Afterwards every file there is compared with the one here. Raises ConfigError in one line.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _in_one_line(name):
        patiently(lambda: api.create_repo(name, private=private or None, exist_ok=True))
        if revision is not None:
            patiently(lambda: api.create_branch(name, branch=revision, exist_ok=True))
        patiently(lambda: api.upload_folder(repo_id=name, folder_path=folder, revision=revision))
        commit = str(patiently(lambda: api.model_info(name, revision=revision)).sha)
        there = {
            entry.path: entry
            for entry in patiently(lambda: list(api.list_repo_tree(name, recursive=True, revision=commit)))
            if hasattr(entry, "blob_id")
        }
    files = sorted(path for path in folder.iterdir() if path.is_file())
    problems = [f"{path.name}: not what is here" for path in files if not _is_same(path, there.get(path.name))]
    return Pushed(commit, len(files), problems)


def _is_same(path: Path, entry: Any) -> bool:
    """Whether the hub's file is this one, by the hash that the hub tells: of the content, or git's."""
    if entry is None or entry.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        if entry.lfs is not None:
            return bool(hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256)
        digest = hashlib.sha1(f"blob {entry.size}\0".encode(), usedforsecurity=False)
        while chunk := file.read(2**20):
            digest.update(chunk)
    return bool(digest.hexdigest() == entry.blob_id)


@contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the hub's client, whose errors have many types
        raise ConfigError(f"--push {name}: {hub_problem(error)}") from error
