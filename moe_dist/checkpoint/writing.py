"""One save from host memory to a committed folder, in a thread of its own.

Ranks meet in the folder itself, not in a process group: each leaves a receipt for what it has written and flushed,
and rank 0 commits when all receipts are there. A hanging disk so never hangs a collective.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_dist.checkpoint.shards import Shard
from moe_dist.checkpoint.storage import Buffer, Storage
from moe_dist.checkpoint.storage.encryption import Keys, Seal
from moe_dist.checkpoint.storage.hashing import write_hashed
from moe_dist.checkpoint.storage.manifest import (
    STATE_FILE,
    Box,
    CheckpointError,
    FileEntry,
    Manifest,
    Strict,
    TensorEntry,
)
from moe_dist.checkpoint.trainer_state import config_sha256

logger = logging.getLogger("moe_dist")
GAVE_UP = "another rank could not write its part; its log says why"


class Receipt(Strict):
    """What one rank has written: file -> length and hash, tensor -> its boxes. Or why it could not."""

    error: str | None = None
    files: dict[str, FileEntry] = {}
    boxes: dict[str, tuple[Box, ...]] = {}


@dataclass(frozen=True)
class Saving:
    """Everything about one save that every rank knows."""

    storage: Storage
    keys: Keys
    staging: str
    step: int
    run: str
    generation: int
    layout: dict[str, int]

    @property
    def world_size(self) -> int:
        return self.layout["world"]

    def receipt(self, rank: int) -> str:
        return f"{self.staging}/receipt-{self.generation}-{rank:05d}.json"

    @property
    def seal(self) -> Seal | None:
        return self.keys.sealing(self.run, self.step)


class Writer(threading.Thread):
    """Writes one rank's shards; on rank 0 `commit` comes after. Nothing it does can end the process.

    `error`: why it failed, in words, None while it has not. `written`: this rank's part is done, or has failed.
    `progress`: grows with every piece that is written.
    """

    def __init__(self, saving: Saving, shards: Sequence[Shard], rank: int, commit: Commit | None) -> None:
        super().__init__(name=f"checkpoint-{saving.step}", daemon=True)
        self.saving, self.shards, self.rank, self.commit = saving, shards, rank, commit
        self.written = threading.Event()
        self.abort = threading.Event()
        self.progress = 0
        self.error: str | None = None
        self.folder: str | None = None

    def run(self) -> None:
        try:
            self._write()
        except Exception as error:
            self.error = describe(error, self.saving)
            self._leave_word()
        finally:
            self.written.set()
        if self.commit is None:
            return
        try:
            receipts = self._all_receipts()
            if self.error is None:
                self.folder = self.commit(receipts)
        except Exception as error:
            self.error = self.error or describe(error, self.saving)
        if self.error is not None:
            self._clear_away()

    def refuse(self, reason: str | None) -> None:
        """Instead of `start`: rank 0 could not even make the folder, and knows the reason."""
        self.error = reason or GAVE_UP
        self.written.set()

    def finish(self, within: float) -> bool:
        """Wait for its end, so many seconds; whether it has come, also when it never began."""
        if self.ident is not None:
            self.join(within)
        return not self.is_alive()

    def _write(self) -> None:
        saving = self.saving
        files: dict[str, FileEntry] = {}
        boxes: dict[str, list[Box]] = {}
        for shard in self.shards:
            shard.check_finite()
            chunks = self._counted(shard.chunks())
            content = chunks if saving.seal is None else saving.seal.seal(shard.file, chunks)
            files[shard.file] = write_hashed(saving.storage, f"{saving.staging}/{shard.file}", content)
            for piece in shard.pieces:
                boxes.setdefault(piece.name, []).append(Box(file=shard.file, offset=piece.offset, shape=piece.shape))
        receipt = Receipt(files=files, boxes={name: tuple(found) for name, found in boxes.items()})
        self._write_receipt(receipt)

    def _counted(self, chunks: Iterable[Buffer]) -> Iterator[Buffer]:
        for chunk in chunks:
            yield chunk
            self.progress += 1

    def _write_receipt(self, receipt: Receipt) -> None:
        path = self.saving.receipt(self.rank)
        # Under another name first: who finds it must find all of it.
        self.saving.storage.put(path, receipt.model_dump_json().encode())

    def _leave_word(self) -> None:
        try:
            self._write_receipt(Receipt(error=self.error))
        except Exception as error:  # the reason it failed may well be that nothing can be written
            logger.info("checkpoint-%d: no word could be left for the other ranks: %s", self.saving.step, error)

    def _all_receipts(self) -> list[Receipt]:
        found: dict[int, Receipt] = {}
        while len(found) < self.saving.world_size:
            if self.abort.is_set():
                raise CheckpointError(GAVE_UP)
            for rank in range(self.saving.world_size):
                path = self.saving.receipt(rank)
                if rank in found or self.saving.storage.size(path) is None:
                    continue
                found[rank] = Receipt.model_validate_json(self.saving.storage.read(path))
                reason = found[rank].error
                if reason is not None:
                    raise CheckpointError(reason if rank == self.rank else f"rank {rank}: {reason}")
            if len(found) < self.saving.world_size:
                time.sleep(self.saving.storage.poll)
        return [found[rank] for rank in range(self.saving.world_size)]

    def _clear_away(self) -> None:
        try:
            self.saving.storage.discard(self.saving.staging, self.saving.generation)
        except Exception as error:
            logger.info("checkpoint-%d: partial work could not be removed yet: %s", self.saving.step, error)


class Commit:
    """Rank 0's last part of a save: the manifest, the rename, and afterwards `then` (what may go now)."""

    def __init__(
        self,
        saving: Saving,
        shapes: Mapping[str, tuple[str, tuple[int, ...]]],
        trainer_state: dict[str, Any],
        metrics: dict[str, float],
        still_ours: Callable[[], None],
        then: Callable[[], None],
    ) -> None:
        """`shapes`: (dtype, shape) of every tensor of the run. `still_ours` raises when another writer took over.

        `trainer_state` and `metrics` are taken as they are now: training goes on and changes them before the commit.
        """
        self.saving, self.shapes, self.metrics = saving, shapes, dict(metrics)
        self.still_ours, self.then = still_ours, then
        self.state_text = json.dumps(trainer_state, indent=1).encode()
        self.config_sha256 = config_sha256(trainer_state["config"])
        self.pretrained = (trainer_state.get("pretrained") or {}).get("files")

    def __call__(self, receipts: Sequence[Receipt]) -> str:
        saving = self.saving
        self.still_ours()
        manifest = self._manifest(receipts)
        for rank in range(saving.world_size):
            saving.storage.remove_file(saving.receipt(rank))
        self.still_ours()
        folder = saving.storage.commit(saving.staging, manifest)
        try:
            self.then()
        except Exception as error:  # the new checkpoint is safe; an old one more is no harm
            logger.warning("checkpoints that may go could not be removed: %s", describe(error, saving))
        return folder

    def _manifest(self, receipts: Sequence[Receipt]) -> Manifest:
        saving = self.saving
        text = [self.state_text]
        content: Any = text if saving.seal is None else saving.seal.seal(STATE_FILE, text)
        files = {STATE_FILE: write_hashed(saving.storage, f"{saving.staging}/{STATE_FILE}", content)}
        boxes: dict[str, list[Box]] = {name: [] for name in self.shapes}
        for receipt in receipts:
            for name, entry in receipt.files.items():
                if name in files:
                    raise CheckpointError(f"two ranks have written {name}")
                files[name] = entry
            for name, found in receipt.boxes.items():
                boxes[name] += found
        missing = [name for name, found in boxes.items() if not found]
        if missing:
            raise CheckpointError(f"no rank has written {missing[0]} ({len(missing)} tensors are missing)")
        manifest = Manifest(
            step=saving.step,
            run=saving.run,
            generation=saving.generation,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            layout=saving.layout,
            config_sha256=self.config_sha256,
            metrics=self.metrics,
            pretrained=self.pretrained,
            encryption=saving.keys.sealed,
            files=files,
            tensors={
                name: TensorEntry(dtype=dtype, shape=shape, boxes=tuple(boxes[name]))  # type: ignore[arg-type]
                for name, (dtype, shape) in self.shapes.items()
            },
        )
        return saving.keys.signed(manifest)


def describe(error: BaseException, saving: Saving) -> str:
    """An error as words that name where it was to be written."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{saving.storage.where}/{saving.staging}: {error.strerror}"
    return f"{saving.storage.where}/{saving.staging}: {type(error).__name__}: {error}"
