"""When a checkpoint is written, and which one a run goes on from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from moe_dist.checkpoint.lock import RunLock
from moe_dist.checkpoint.ownership import Ownership
from moe_dist.checkpoint.reading import CheckpointRef, choose, locate, problems, read_trainer_state
from moe_dist.checkpoint.shapes import OPTIMIZER, missing_weights, moment_problems
from moe_dist.checkpoint.shards import Shard, ShardReader, split
from moe_dist.checkpoint.storage import Storage, step_folder
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError, Manifest
from moe_dist.checkpoint.writing import GAVE_UP, Commit, Saving, Writer, describe
from moe_dist.config import CheckpointConfig
from moe_dist.parallel.mesh import Mesh

if TYPE_CHECKING:
    from moe_dist.checkpoint.state import LogicalState, SavePlan

logger = logging.getLogger("moe_dist")
Answer = TypeVar("Answer")
_ROUND = 1.0
"""Seconds after which ranks that wait for the end of a save tell each other how far they are."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended. `blocked_seconds`: how long training stood still for it; `error` None: committed."""

    step: int
    path: str
    seconds: float
    blocked_seconds: float
    num_bytes: int
    error: str | None


@dataclass(frozen=True)
class Loaded:
    """What a run goes on from."""

    checkpoint: CheckpointRef
    manifest: Manifest
    trainer_state: dict[str, Any]

    @property
    def is_imported(self) -> bool:
        """Whether it is a model from elsewhere: weights of step 0, and nothing that a trainer has made."""
        return self.manifest.step == 0 and not any(name.startswith(OPTIMIZER) for name in self.manifest.tensors)


class Checkpoints:
    """Saves and loads the steps of one run; every rank has one and calls the same methods in the same order.

    A save blocks for the copy to host memory alone; one is in flight at most. `status` says, without waiting, how
    the one in flight stands on this rank; when the ranks have put their answers together they all call `settle`.
    """

    def __init__(
        self,
        storage: Storage,
        mesh: Mesh,
        config: CheckpointConfig,
        run: str = "0",
        generation: int = 0,
        lock: RunLock | None = None,
        zero_stage: int = 0,
        load_optimizer: bool = True,
        earlier: str | None = None,
    ) -> None:
        """`lock`: held by rank 0. `run`, `earlier`, `generation`: as `Ownership` has them, the same on every rank.
        `zero_stage`: for people who read the manifest. `load_optimizer`: a checkpoint must have moments that fit its
        weights."""
        self.storage, self.mesh, self.config = storage, mesh, config
        self.owner = Ownership(storage, run, generation, lock, earlier)
        self.zero_stage = zero_stage
        self.load_optimizer = load_optimizer
        self.keys = Keys(config.encryption_keys, config.signing_key)
        self._plan: SavePlan | None = None
        self._shards: list[Shard] | None = None
        self._writer: Writer | None = None
        self._started = 0.0
        self._blocked = 0.0

    # ---- saving

    @property
    def in_flight(self) -> bool:
        """Whether a save has begun and has not been settled."""
        return self._writer is not None

    @property
    def status(self) -> tuple[bool, bool]:
        """(this rank could not write its part, the whole save has ended: only rank 0 knows)."""
        writer = self._writer
        if writer is None:
            return False, False
        failed = writer.written.is_set() and writer.error is not None
        return failed, writer.commit is not None and not writer.is_alive()

    def begin(self, step: int, state: LogicalState, trainer_state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Copy the state and start to write it (collective). Nothing may be in flight.

        A state of other tensors than the model has is a save that has failed.
        """
        assert self._writer is None
        self._started = time.perf_counter()
        saving = Saving(
            self.storage,
            self.keys,
            self.storage.staging(step, self.owner.generation),
            step,
            self.owner.run,
            self.owner.generation,
            self.layout,
        )
        wrong = self._agree_on_plan(state)
        if self._plan is None:
            self._writer = Writer(saving, [], self.mesh.rank, None)
            self._writer.refuse(wrong)
            return
        error = self._prepare(saving) if self.mesh.rank == 0 else None
        if self._shards is None:
            self._shards = split(self._plan.items, f"shard-{self.owner.generation}-{self.mesh.rank:05d}")
        for shard in self._shards:
            for piece, view in zip(shard.pieces, shard.views, strict=True):
                view.copy_(self._plan.tensor(state, piece), non_blocking=True)
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        # No rank writes before the folder is there, and none when it cannot be.
        refused = self.mesh.sum_over("world", torch.tensor([float(error is not None)], device=self.mesh.device))
        commit = None
        if self.mesh.rank == 0:
            kept = {name: value for name, value in metrics.items() if math.isfinite(value)}
            then = partial(self.owner.retain, step, self.config)
            commit = Commit(saving, self._plan.shapes(), trainer_state, kept, self.owner.check, then)
        self._writer = Writer(saving, self._shards, self.mesh.rank, commit)
        if refused.item():
            self._writer.refuse(error)
        else:
            self._writer.start()
        self._blocked = time.perf_counter() - self._started

    def _agree_on_plan(self, state: LogicalState) -> str | None:
        """Plan the first save, once all ranks hold what the model has; every save is held against it. Returns what is
        wrong, and there is no plan then.
        """
        wrong = state.wrong_shapes()
        if self._plan is not None:
            wrong += [
                f"{name} is not in every save of this run" for name in sorted(self._plan.names ^ set(state.tensors))
            ]
        if self.mesh.sum_over("world", torch.tensor([float(len(wrong))], device=self.mesh.device)).item():
            self._plan = self._shards = None
            return next((line for lines in self.mesh.from_all(wrong[:1]) for line in lines), None)
        if self._plan is None:
            from moe_dist.checkpoint.state import SavePlan  # torch's planners take long to import

            plan = SavePlan(state, self.mesh)
            if missing := missing_weights(plan.shapes(), state.model_shapes):  # the plan is the same on every rank
                return f"{missing[0]} is on no rank ({len(missing)} tensors are missing)"
            self._plan = plan
        return None

    def settle(self, alive: Callable[[], None] = lambda: None) -> Outcome:
        """The end of the save in flight (collective): waits for it, and says how it went.

        The outcome is rank 0's; `error` is the same on every rank in being None or not. `alive` is called while this
        rank's part makes progress.
        """
        writer, plan = self._writer, self._plan
        assert writer is not None
        before = time.perf_counter()
        progress = -1
        while True:  # in rounds: no collective waits for a slow disk
            over = writer.finish(_ROUND)
            if writer.progress != progress:
                progress = writer.progress
                alive()
            mine = [not over, not writer.written.is_set(), writer.error is not None]
            running, writing, failed = self.mesh.sum_over(
                "world", torch.tensor(mine, dtype=torch.float32, device=self.mesh.device)
            ).tolist()
            if failed and not writing:
                writer.abort.set()
            if not running:
                break
        self._writer = None
        texts = [text for lines in self.mesh.from_all([writer.error] if writer.error else []) for text in lines]
        # The first cause: a rank that only gave up for another's sake has less to say.
        error = min(texts, key=lambda text: text == GAVE_UP, default=None)
        now = time.perf_counter()
        return Outcome(
            step=writer.saving.step,
            path=f"{self.storage.where}/{step_folder(writer.saving.step)}",
            seconds=now - self._started,
            blocked_seconds=self._blocked + (now - before),
            num_bytes=0 if plan is None else plan.num_bytes,
            error=error,
        )

    @property
    def layout(self) -> dict[str, int]:
        """Sizes as the manifest tells them."""
        layout = self.mesh.layout
        sizes = {"world": layout.world_size, "pp": layout.pp_size, "edp": layout.edp_size, "ep": layout.ep_size}
        return sizes | {"zero_stage": self.zero_stage}

    def _prepare(self, saving: Saving) -> str | None:
        """Make the folder; returns why not."""
        assert self._plan is not None
        try:
            self.owner.check()
            check_room(self.storage, self._plan.num_bytes)
            self.storage.begin(saving.staging, saving.generation)
        except Exception as error:
            return describe(error, saving)
        return None

    # ---- loading

    def find(self, wanted: str, skipped: Callable[[str], None]) -> CheckpointRef | None:
        """The checkpoint to go on from (collective); None: start afresh, for nothing has ever been committed.

        `auto`: the newest that verifies; `skipped` is called with what is wrong with those before it. A step or a path:
        that one or none. Raises CheckpointError on every rank.
        """
        if wanted == "auto":
            steps = self.mesh.ask_rank_zero(self._candidates)
            return choose([CheckpointRef(self.storage, step) for step in reversed(steps)], self._accept, skipped)
        found = locate(wanted, self.storage)
        wrong = self.verify(found)
        if wrong:
            raise CheckpointError(f"checkpoint.resume={wanted}: {wrong[0]}")
        return found

    def _candidates(self) -> list[int]:
        steps = self.storage.candidates()
        lock = self.owner.lock
        noted = None if steps or lock is None else lock.noted
        if noted is not None:
            raise CheckpointError(
                f"{noted} was committed by this run, and {self.storage.where} holds no checkpoint now: is it mounted? "
                "Bring it back, or start afresh with checkpoint.resume=never"
            )
        return steps

    def _accept(self, found: CheckpointRef) -> list[str]:
        wrong = self.verify(found)
        if wrong:
            self.owner.rejected.add(found.step)
        return wrong

    def verify(self, found: CheckpointRef) -> list[str]:
        """Everything wrong with a checkpoint (collective): the ranks share out its files.

        Raises CheckpointError for want of its key: a step that only cannot be opened is no reason for an older one.
        """

        def look() -> list[str]:
            try:
                manifest = found.storage.manifest(found.step)
                self.keys.check_signature(manifest, str(found))
            except (CheckpointError, OSError) as error:
                return [str(error)]
            self.keys.opening(manifest, str(found))
            if self.mesh.rank == 0 and self.load_optimizer and (wrong := moment_problems(manifest)):
                return [f"{found}: {line}" for line in wrong]
            return problems(found, manifest, sorted(manifest.files)[self.mesh.rank :: self.mesh.layout.world_size])

        return list(dict.fromkeys(line for lines in self.mesh.from_all(self._together(look)) for line in lines))

    def read_state(self, found: CheckpointRef) -> Loaded:
        """Counters and configuration of a verified checkpoint (collective)."""

        def read() -> Loaded:
            manifest = found.storage.manifest(found.step)
            return Loaded(found, manifest, read_trainer_state(found, manifest, self.keys))

        return self._together(read)

    def read_tensors(self, loaded: Loaded, state: LogicalState) -> None:
        """Fill this rank's tensors in place, whatever layout wrote them. Raises CheckpointError on every rank."""
        seal = self.keys.opening(loaded.manifest, str(loaded.checkpoint))
        reader = ShardReader(loaded.checkpoint.storage, loaded.checkpoint.folder, seal and seal.open)
        from moe_dist.checkpoint.state import read_into

        self._together(lambda: read_into(state, loaded.manifest, reader))

    def _together(self, do: Callable[[], Answer]) -> Answer:
        """What `do` gives on this rank; when it raises on any, CheckpointError on all: none waits for the others."""
        answer, errors = None, []
        try:
            answer = do()
        except (ValueError, OSError) as error:
            errors = [str(error)]
        for lines in self.mesh.from_all(errors):
            if lines:
                raise CheckpointError(lines[0])
        return cast(Answer, answer)


def check_room(storage: Storage, num_bytes: int) -> None:
    """Raises CheckpointError when a checkpoint of so many bytes will not fit."""
    free = storage.free_bytes()
    if free is not None and free < num_bytes * 1.01 + 2**20:
        raise CheckpointError(f"No space left on {storage.where}: need {_size(num_bytes)}, have {_size(free)}")


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
