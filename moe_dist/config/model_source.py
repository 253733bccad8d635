"""Where a model to start from is: a folder of this machine, a name on the Hugging Face Hub, or a URL.

What is elsewhere is fetched into a cache of this host, once: one process does it, the others wait. Nothing that is
fetched is executed. Imports nothing of the network until there is something to fetch.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_dist.config.host_cache import PATTERNS, WAITING, one_at_a_time
from moe_dist.config.wording import ConfigError

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_IGNORED = ["*/*", "consolidated*"]
WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before a hub that is busy is asked again."""
_BUSY = (408, 429, 500, 502, 503, 504)


def hub_name(source: str) -> tuple[str, str | None] | None:
    """`org/name@revision` as (name, revision); None for what cannot be one."""
    found = _NAME.fullmatch(source)
    return (found[1], found[2]) if found else None


def local_folder(source: str, path: Path, said: str, notice: Callable[[str], None]) -> Path:
    """The folder that is meant; fetched first where it is elsewhere. `path`: what `source` is as a path.

    A folder of that name, there or in the working directory, comes before the hub. Raises ConfigError in one line.
    """
    if "://" in source:
        from moe_dist.config.model_url import fetch

        return fetch(source, said, notice)
    name = hub_name(source)
    if name is None or path.exists():
        return path
    if (here := Path(os.path.abspath(source))).is_dir():
        return here
    return _from_hub(*name, said, notice)


def _from_hub(name: str, revision: str | None, said: str, notice: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download  # also reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE
    from huggingface_hub.errors import LocalEntryNotFoundError

    def get(local: bool) -> Path:
        found: Any = snapshot_download(
            name, revision=revision, allow_patterns=PATTERNS, ignore_patterns=_IGNORED, local_files_only=local
        )
        return Path(found)

    with one_at_a_time(f"{name}@{revision}", lambda: notice(f"{said}: {WAITING}")) as waited:
        try:
            if waited:  # another process of this host has just fetched it
                try:
                    return get(local=True)
                except LocalEntryNotFoundError:
                    pass
            notice(f"{said}: no folder here; looking for it on the Hugging Face Hub")
            return patiently(lambda: get(local=False))
        except Exception as error:  # of the hub's client, whose errors have many types
            raise ConfigError(f"{said}: no such folder here, and {hub_problem(error)}") from error


def patiently(do: Callable[[], Any]) -> Any:
    """What `do` gives; where the hub is busy, after another try. What was sent or fetched before is not again."""
    for wait in WAITS:
        try:
            return do()
        except Exception as error:
            if _status(error) not in _BUSY:
                raise
            time.sleep(wait)
    return do()


def hub_problem(error: BaseException) -> str:
    """An error of the hub's client in a few words on one line."""
    status, kinds = _status(error), {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    if "LocalTokenNotFoundError" in kinds:
        return "there is no token: set HF_TOKEN"
    if "GatedRepoError" in kinds:
        return "the hub asks who wants it (gated): accept its terms there, and set HF_TOKEN"
    if status in (401, 403) and not _has(error, "Repository Not Found"):
        return f"the hub refuses the token ({status}): set HF_TOKEN to one that may do this"
    if "RepositoryNotFoundError" in kinds:
        return "the hub has no such model, or HF_TOKEN may not see it"
    if "RevisionNotFoundError" in kinds:
        return "the hub has no such revision of it"
    if "OfflineModeIsEnabled" in kinds or "IncompleteSnapshotError" in kinds or (status is None and _is_local(kinds)):
        return "the hub's cache has not all of it, and the hub cannot be asked"
    text = " ".join(str(error).split())
    return f"the hub could not be used: {f'status {status}' if status else text[:200] or type(error).__name__}"


def _is_local(kinds: set[str]) -> bool:
    return bool({"LocalEntryNotFoundError", "ConnectError", "ConnectionError"} & kinds)


def _has(error: BaseException, words: str) -> bool:
    return any(words in str(one) for one in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The status that the hub has answered with, if it has."""
    for one in _chain(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None
