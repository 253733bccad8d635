"""Which checkpoint to go on from: every byte is checked before any weight is touched. Imports no torch by itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from moe_dist.checkpoint.shapes import moment_problems
from moe_dist.checkpoint.storage import Storage, open_storage, step_folder
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.hashing import hash_file
from moe_dist.checkpoint.storage.manifest import STATE_FILE, CheckpointError, Manifest
from moe_dist.checkpoint.trainer_state import check_trainer_state


class CheckpointRef(NamedTuple):
    """A committed step and where it is."""

    storage: Storage
    step: int

    @property
    def folder(self) -> str:
        return step_folder(self.step)

    def __str__(self) -> str:
        return f"{self.storage.where}/{self.folder}"


def locate(wanted: str, storage: Storage) -> CheckpointRef:
    """The checkpoint a person means: a step of this run, or the path or URL of a checkpoint's folder.

    Raises CheckpointError when the words mean none; whether it is there and whole is another question.
    """
    if wanted.isdigit():
        return CheckpointRef(storage, int(wanted))
    parent, _, name = wanted.rstrip("/").rpartition("/")
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    if match is None:
        raise CheckpointError(
            f"checkpoint.resume={wanted}: not auto, never, a step, or the folder of a checkpoint (checkpoint-<step>)"
        )
    return CheckpointRef(open_storage(parent or "."), int(match[1]))


def problems(found: CheckpointRef, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """What is wrong with these files of a checkpoint, each line naming its file; empty when every byte is right."""

    def look(name: str) -> str | None:
        path, entry = f"{found.folder}/{name}", manifest.files[name]
        where = f"{found.storage.where}/{path}"
        try:
            size = found.storage.size(path)
            if size is None:
                return f"{where}: missing{_of(manifest, name)}"
            if size != entry.bytes:
                return f"{where}: {size} bytes instead of {entry.bytes}{_of(manifest, name)}"
            if hash_file(found.storage, path) != entry.blake3:
                return f"{where}: its BLAKE3 is not what was written{_of(manifest, name)}"
        except OSError as error:
            return f"{where}: {error.strerror or error}{_of(manifest, name)}"
        return None

    wanted = list(names)
    with ThreadPoolExecutor(max(1, min(4, len(wanted)))) as pool:
        return [line for line in pool.map(look, wanted) if line]


def _of(manifest: Manifest, file: str) -> str:
    """Which tensors a file holds, for the person who must know what is lost."""
    names = [name for name, tensor in manifest.tensors.items() if any(box.file == file for box in tensor.boxes)]
    if not names:
        return ""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f" (holds {', '.join(names[:2])}{more})"


def whole(found: CheckpointRef) -> list[str]:
    """Everything that is wrong with a checkpoint; empty when it verifies. One process does all of it."""
    try:
        manifest = found.storage.manifest(found.step)
    except (CheckpointError, OSError) as error:
        return [str(error)]
    extra = sorted(set(found.storage.files(found.folder)) - set(manifest.files) - {"manifest.json"})
    lines = [f"{found}/{name}: not part of the checkpoint" for name in extra]
    return (
        problems(found, manifest, manifest.files) + lines + [f"{found}: {line}" for line in moment_problems(manifest)]
    )


def choose(
    candidates: Sequence[CheckpointRef], check: Callable[[CheckpointRef], list[str]], skipped: Callable[[str], None]
) -> CheckpointRef | None:
    """The first candidate that verifies, those before it reported through `skipped`; None without candidates.

    Raises CheckpointError when there are some and none is good: to start afresh then must be somebody's decision.
    """
    reasons = []
    for found in candidates:
        wrong = check(found)
        if not wrong:
            return found
        reasons.append(wrong[0])
        skipped(f"{found} is not used: {wrong[0]}" + (f" ({len(wrong)} problems)" if len(wrong) > 1 else ""))
    if not reasons:
        return None
    storage = candidates[0].storage
    afresh = "checkpoint.resume=never (they are kept, moved aside)" if storage.renames else "another checkpoint.folder"
    raise CheckpointError(
        f"none of the {len(reasons)} checkpoints in {storage.where} can be used, the newest because of "
        f"{reasons[0]}; repair one, or start afresh with {afresh}"
    )


def read_trainer_state(found: CheckpointRef, manifest: Manifest, keys: Keys) -> dict[str, Any]:
    """Counters and configuration, of the right form. Raises CheckpointError."""
    path = f"{found.folder}/{STATE_FILE}"
    seal = keys.opening(manifest, str(found))
    content = found.storage.read(path, manifest.files[STATE_FILE].bytes)
    where = f"{found.storage.where}/{path}"
    try:
        state = json.loads(content if seal is None else seal.open(STATE_FILE, content))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    return check_trainer_state(state, manifest, where)


def as_path(found: CheckpointRef) -> Path | None:
    """The folder on this machine, None in an object store."""
    return found.storage.local_path(found.folder)
