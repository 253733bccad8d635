"""Where checkpoints live: a folder on disk, or an object store. Imports no torch.

The order of a commit is in `Storage.commit`: on disk everything is flushed under a temporary name, the manifest last,
and one rename makes it a checkpoint; in an object store, which knows no rename, the manifest is the last object.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe_dist.checkpoint.storage.manifest import FILE, MAX_BYTES, CheckpointError, Manifest, from_text, to_text

CHUNK = 8 * 2**20
"""Bytes written or fetched at a time."""
STEP = re.compile(r"checkpoint-(0|[1-9]\d{0,15})")
_SET_ASIDE = re.compile(r"aside-\d+-checkpoint-\d+(-\d+)?")
LEFTOVER = re.compile(r"\.checkpoint-\d+\.\d+\.tmp|\.trash-checkpoint-.*")
OURS = re.compile(r"shard-\d+-\d+(-\d+)?\.safetensors|receipt-\d+-\d+\.json|trainer_state\.json")
_OF_A_START = re.compile(r"(?:shard|receipt)-(\d+)-")

Buffer = bytes | memoryview


def step_folder(step: int) -> str:
    """Name of the folder of a committed step."""
    return f"checkpoint-{step}"


def set_aside_name(name: str) -> bool:
    """Whether `Storage.set_aside` has given this name."""
    return _SET_ASIDE.fullmatch(name) is not None


def generation_of(name: str) -> int | None:
    """The start of a run that wrote this file; None when its name does not tell."""
    match = _OF_A_START.match(name)
    return int(match[1]) if match else None


class Storage(ABC):
    """A folder or bucket of checkpoints. Paths are `<folder>/<file>` relative to it."""

    where: str
    """For people."""
    renames = True
    """Whether a committed step can be given another name."""
    poll: float = 0.01
    """Seconds between two looks at whether something is there."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Everything at the top that could be a checkpoint or what is left of one."""

    @abstractmethod
    def staging(self, step: int, generation: int) -> str:
        """Name of the folder that a save fills before it is committed."""

    @abstractmethod
    def begin(self, folder: str, generation: int) -> None:
        """Make an empty staging folder for this start of the run."""

    @abstractmethod
    def write(self, path: str, chunks: Iterable[Buffer]) -> None:
        """Write a file so that it survives a power cut; on failure nothing of that name is worth anything."""

    @abstractmethod
    def put(self, path: str, content: bytes) -> None:
        """Write a small file such that whoever sees it sees all of it."""

    @abstractmethod
    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """A whole file. Raises FileNotFoundError; CheckpointError when it is longer than `max_bytes`."""

    @abstractmethod
    def chunks(self, path: str) -> Iterator[Buffer]:
        """A file piece by piece."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Bytes of a plain file; None when there is none (a link is none)."""

    @abstractmethod
    def files(self, folder: str) -> list[str]:
        """Names inside a folder."""

    @abstractmethod
    def _publish(self, staging: str, step: int, manifest: bytes) -> None: ...

    @abstractmethod
    def remove(self, folder: str) -> None:
        """Delete a folder such that a crash in between leaves no checkpoint that looks whole."""

    @abstractmethod
    def remove_file(self, path: str) -> None:
        """Delete one file; nothing happens when it is not there."""

    def set_aside(self, step: int, generation: int) -> str:
        """Give a step another name, under which it is none, and return it. Only where `renames`."""
        raise NotImplementedError

    def free_bytes(self) -> int | None:
        """Room left, None where nobody can say."""
        return None

    def local_path(self, path: str) -> Path | None:
        """The file on this machine, None when it is elsewhere."""
        return None

    def steps(self) -> list[int]:
        """Committed steps, oldest first: folders of the right name with a manifest in them."""
        found = steps_in(self.folders())
        return [step for step in found if self.size(f"{step_folder(step)}/{FILE}") is not None]

    def candidates(self) -> list[int]:
        """Steps that were committed once, oldest first, whatever has become of them since."""
        return self.steps()

    def is_ours(self, step: int) -> bool:
        """Whether a folder with the name of a step holds anything that a run writes, whole or damaged."""
        return any(name == FILE or OURS.fullmatch(name) for name in self.files(step_folder(step)))

    def newest_generation(self) -> int:
        """The highest start of a run that has left files here, committed or not; 0 when none has."""
        ours = (name for name in self.folders() if STEP.fullmatch(name) or LEFTOVER.fullmatch(name))
        return max((generation_of(name) or 0 for folder in ours for name in self.files(folder)), default=0)

    @abstractmethod
    def leftovers(self) -> list[str]:
        """What saves and deletions that were cut short have left behind: ours for certain, and worth nothing."""

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step. Raises CheckpointError when there is none, or it is damaged or another step's."""
        path = f"{step_folder(step)}/{FILE}"
        where = f"{self.where}/{path}"
        if self.size(path) is None:
            raise CheckpointError(f"{self.where}/{step_folder(step)}: no complete checkpoint there{self._beside()}")
        manifest = from_text(self.read(path, MAX_BYTES), where)
        if manifest.step != step:
            raise CheckpointError(f"{where}: damaged: it is of step {manifest.step}")
        return manifest

    def commit(self, staging: str, manifest: Manifest) -> str:
        """Make a filled staging folder the checkpoint of its step. Returns the folder's name.

        Raises CheckpointError when that step is committed already: nothing is ever overwritten.
        """
        self.refuse_existing(manifest.step)
        self._publish(staging, manifest.step, to_text(manifest))
        return step_folder(manifest.step)

    def refuse_existing(self, step: int) -> None:
        """Raises CheckpointError when a step is committed."""
        if self.size(f"{step_folder(step)}/{FILE}") is not None:
            raise CheckpointError(
                f"{self.where}/{step_folder(step)}: is there already, and no checkpoint is ever overwritten"
            )

    def discard(self, staging: str, generation: int) -> None:
        """Remove what this start of the run has put into a staging folder that will not be committed."""
        self.remove(staging)

    def _beside(self) -> str:
        names = ", ".join(step_folder(step) for step in self.steps()[-5:])
        return f" (complete ones beside it: {names or 'none'})"


def steps_in(names: Iterable[str]) -> list[int]:
    return sorted(int(match[1]) for name in names if (match := STEP.fullmatch(name)))
