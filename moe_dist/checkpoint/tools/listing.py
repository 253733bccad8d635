"""What a storage of checkpoints holds: from manifests and sizes alone, or (`verdict`) read in full. No torch."""

from __future__ import annotations

import calendar
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from moe_dist.checkpoint.reading import CheckpointRef, read_trainer_state, whole
from moe_dist.checkpoint.shapes import configuration_problems
from moe_dist.checkpoint.storage import Storage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError, Manifest


class Listed(NamedTuple):
    """A step as it looks from outside. `problems`: of its manifest and of the sizes of its files."""

    checkpoint: CheckpointRef
    manifest: Manifest | None
    problems: list[str]

    @property
    def age_seconds(self) -> float | None:
        """Seconds since it was written."""
        if self.manifest is None:
            return None
        try:
            return max(0.0, time.time() - calendar.timegm(time.strptime(self.manifest.created, "%Y-%m-%dT%H:%M:%SZ")))
        except ValueError:
            return None


def listed(found: CheckpointRef) -> Listed:
    """Look at one step. Never raises for what is wrong with it."""
    try:
        manifest = found.storage.manifest(found.step)
        wrong = [line for name in sorted(manifest.files) if (line := _size_problem(found, manifest, name))]
    except (CheckpointError, OSError) as error:
        return Listed(found, None, [str(error)])
    return Listed(found, manifest, wrong)


def _size_problem(found: CheckpointRef, manifest: Manifest, name: str) -> str | None:
    size, expected = found.storage.size(f"{found.folder}/{name}"), manifest.files[name].bytes
    if size is None:
        return f"{found}/{name}: missing"
    return None if size == expected else f"{found}/{name}: {size} bytes instead of {expected}"


def seal_problems(found: CheckpointRef, manifest: Manifest, keys: Keys, names: Iterable[str]) -> Iterator[str]:
    """Sealed files that these keys do not open. Raises CheckpointError when none of the keys is the right one."""
    seal = keys.opening(manifest, str(found))
    if seal is None:
        return
    for name in names:
        try:
            seal.open(name, found.storage.read(f"{found.folder}/{name}"))
        except (CheckpointError, OSError) as error:
            yield f"{found.storage.where}/{found.folder}/{error}"


class Verdict(NamedTuple):
    """What is wrong with a checkpoint, and what could not be looked at."""

    problems: list[str]
    note: str | None


def verdict(found: CheckpointRef, keys: Keys) -> Verdict:
    """Read a step in full: bytes, signature and seals by these keys, shapes. Raises CheckpointError for a wrong key."""
    wrong = whole(found)
    if wrong:
        return Verdict(wrong, None)
    manifest = found.storage.manifest(found.step)
    try:
        keys.check_signature(manifest, str(found))
    except CheckpointError as error:
        return Verdict([str(error)], None)
    if keys.keys:
        wrong = list(seal_problems(found, manifest, keys, sorted(manifest.files)))
    elif manifest.encryption is not None:
        return Verdict([], "encrypted: shapes were compared with one another, not with its configuration")
    if wrong:
        return Verdict(wrong, None)
    lines, note = configuration_problems(manifest, read_trainer_state(found, manifest, keys).get("config", {}))
    return Verdict([f"{found}: {line}" for line in lines], note)


def room_taken(storage: Storage, folder: str) -> int:
    """Bytes of the files in a folder."""
    return sum(storage.size(f"{folder}/{name}") or 0 for name in storage.files(folder))


def is_local(storage: Storage) -> Path | None:
    """The folder on this machine, None for an object store."""
    return storage.local_path("")
