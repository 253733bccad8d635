"""Whose checkpoints a storage holds: what this start of a run may write, move and delete there. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from moe_dist.checkpoint.lock import RunLock
from moe_dist.checkpoint.retention import to_remove
from moe_dist.checkpoint.storage import LocalStorage, Storage, same_storage, step_folder
from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.config import CheckpointConfig

CLAIM = ".writer.json"
"""Beside checkpoints that go elsewhere than into the run folder: the start that writes here."""


class Ownership:
    """One start of a run in the storage of its checkpoints; only rank 0 asks it to change anything.

    `run`: the run that writes; a start that goes on from what lies here takes its name from there. `earlier`: the
    run that this run folder was of before. `rejected`: steps that did not verify when this start looked for one.
    """

    def __init__(self, storage: Storage, run: str, generation: int, lock: RunLock | None, earlier: str | None) -> None:
        self.storage, self.run, self.generation, self.lock, self.earlier = storage, run, generation, lock, earlier
        self.rejected: set[int] = set()
        self._has_claimed = False

    def check(self) -> None:
        """Raises CheckpointError when another start, or another run, writes here: nothing more may be written."""
        if self.lock is None:
            return
        self.lock.check()
        newest = self.storage.newest_generation()
        claim = read_claim(self.storage) if self._has_claimed else {}
        if newest > self.generation or claim.get("token", self.lock.token) != self.lock.token:
            # One with another run folder, whose lock this one cannot see.
            start = max(newest, int(claim.get("generation", 0)))
            raise CheckpointError(
                f"{self.storage.where}: start {start} of a run writes here, and this is start {self.generation}; "
                "nothing more is written"
            )

    def claim(self) -> None:
        """From now on this start writes here, also for those who have another run folder."""
        assert self.lock is not None
        if same_storage(self.storage, LocalStorage(self.lock.path.parent)):
            return  # the lock says so
        if (root := self.storage.local_path(".")) is not None:
            root.mkdir(parents=True, exist_ok=True)
        content = {"run": self.run, "generation": self.generation, "token": self.lock.token}
        self.storage.put(CLAIM, json.dumps(content).encode() + b"\n")
        self._has_claimed = True

    def retain(self, step: int, config: CheckpointConfig) -> None:
        """`step` is committed: note it, and remove what need not stay. What another run has written stays."""
        if self.lock is not None:
            with suppress(OSError):
                self.lock.note(f"{self.storage.where}/{step_folder(step)}")
        # Where a step cannot be renamed, damaged ones stay, also later than this: they must not push out good ones.
        steps = [other for other in self.storage.steps() if other <= step and other not in self.rejected]
        metrics: dict[int, float] | None = None
        if config.metric_for_best_model is not None:
            metrics = self.metrics(config.metric_for_best_model)
        for old in to_remove(
            steps,
            limit=config.save_total_limit,
            keep_every=config.keep_every,
            metrics=metrics,
            greater_is_better=config.greater_is_better,
        ):
            self.check()
            if self._run_of(old) == self.run:
                self.storage.remove(step_folder(old))

    def metrics(self, name: str) -> dict[int, float]:
        """A metric of each committed step that has it."""
        found = {}
        for step in self.storage.steps():
            try:
                values = self.storage.manifest(step).metrics
            except CheckpointError:
                continue  # whoever resumes is told; here it is only not the best
            if name in values:
                found[step] = values[name]
        return found

    def clean_up(self) -> list[str]:
        """Remove what saves that were cut short have left. Returns their names."""
        found = self.storage.leftovers()
        for folder in found:
            self.storage.remove(folder)
        return found

    def later(self, step: int) -> list[int]:
        """Steps after `step`, from which the run goes on, -1 for all: they are not of its past, and in its way.

        Raises CheckpointError where they are not of this run folder's runs, or must be moved where nothing can be.
        """
        later = [other for other in self.storage.candidates() if other > step]
        foreign = [other for other in later if self._is_foreign(other)]
        if foreign:
            raise CheckpointError(
                f"{self.storage.where}/{step_folder(foreign[0])}: is in the way, and no run in this run folder has "
                f"written it; move it elsewhere, or give another {self._key}"
            )
        good = [step_folder(other) for other in later if other not in self.rejected]
        if good and not self.storage.renames:
            what = f"later than {step_folder(step)}" if step >= 0 else "not of the run"
            raise CheckpointError(
                f"{self.storage.where}: {', '.join(good)} would be {what} from which this run is to go on, and nothing "
                "can be renamed there: give another checkpoint.folder, or remove them"
            )
        return later

    def set_aside(self, steps: Sequence[int]) -> list[tuple[int, str | None]]:
        """Give steps another name: they would be taken for the newest of the run by its next start.

        Returns each with its new name, None where it had to stay.
        """
        there = [step for step in self.storage.candidates() if step in steps]
        if not self.storage.renames:
            return [(step, None) for step in there]
        return [(step, self.storage.set_aside(step, self.generation)) for step in there]

    @property
    def _key(self) -> str:
        inside = self.lock is not None and same_storage(self.storage, LocalStorage(self.lock.path.parent))
        return "train.output_dir" if inside else "checkpoint.folder"

    def _is_foreign(self, step: int) -> bool:
        run = self._run_of(step)
        if run is not None:  # a damaged one may have got its manifest from anywhere
            return self.lock is not None and step not in self.rejected and run not in (self.run, self.earlier)
        return not self.storage.is_ours(step) and bool(self.storage.files(step_folder(step)))

    def _run_of(self, step: int) -> str | None:
        """The run that has written a step; None when its manifest cannot be read."""
        try:
            return self.storage.manifest(step).run
        except (CheckpointError, OSError):
            return None


def read_claim(storage: Storage) -> dict[str, Any]:
    """What the last start that claimed this storage has left there; empty when none has."""
    with suppress(OSError, ValueError):
        content = json.loads(storage.read(CLAIM, 65536))
        if isinstance(content, dict):
            return content
    return {}
