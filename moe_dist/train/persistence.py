"""The run's state on disk: what is saved and when, what a run goes on from, and what may differ."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.changes import changes, global_batch
from moe_dist.checkpoint.manager import Checkpoints, Loaded, Outcome, check_room
from moe_dist.checkpoint.manifest import STATE_FILE, CheckpointError
from moe_dist.checkpoint.reading import Found
from moe_dist.checkpoint.state import LogicalState
from moe_dist.checkpoint.storage import open_storage, same_place
from moe_dist.config import Config
from moe_dist.data.loader import GlobalLoader
from moe_dist.models.counts import parameter_counts
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.deepspeed import DeepSpeedEngine
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.state_bytes import moments
from moe_dist.train.acting import Acting
from moe_dist.train.opening import RunPlace
from moe_dist.train.optimizer import Optimizer
from moe_dist.train.step import StepResult
from moe_dist.train.stopping import Pace, Stopping

logger = logging.getLogger("moe_dist")


@dataclass
class Counters:
    """What a run has done so far, over all its starts."""

    step: int = 0
    """Optimizer steps finished."""
    tokens: int = 0
    """Tokens consumed, all ranks."""
    skipped: int = 0
    """Steps skipped for a non-finite loss or gradient."""
    elapsed: float = 0.0
    """Seconds of training."""
    initial_loss: float | None = None
    """Loss of the first step ever."""
    saves_failed: int = 0
    """Checkpoints that could not be committed."""

    def add(self, result: StepResult) -> None:
        """One more step."""
        self.step += 1
        self.tokens += result.num_tokens
        self.skipped += result.skipped
        if self.initial_loss is None and result.num_labels:
            self.initial_loss = result.loss


class Persistence:
    """Saves and restores model, optimizer, data position, schedules and counters; the same calls on every rank."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        model: Transformer,
        optimizer: Optimizer | DeepSpeedEngine,
        loader: GlobalLoader,
        stopping: Stopping,
        acting: Acting,
        place: RunPlace,
        alive: Callable[[], None],
    ) -> None:
        """`alive` is called while a save that training waits for makes progress."""
        self.config, self.mesh, self.model, self.optimizer = config, mesh, model, optimizer
        self.loader, self.stopping, self.acting, self._alive = loader, stopping, acting, alive
        checkpoint = config.checkpoint
        storage = open_storage(checkpoint.folder or config.train.output_dir)
        self.place = place
        self.checkpoints = Checkpoints(
            storage,
            mesh,
            checkpoint,
            place.run,
            place.generation,
            place.lock,
            config.parallel.zero_stage,
            place.load_optimizer,
        )
        self.saved_step = -1
        """Step of the last save begun, or of the checkpoint the run goes on from."""

    @property
    def is_on(self) -> bool:
        """Whether this run saves at all."""
        return bool(self.config.checkpoint.save_steps or self.config.checkpoint.save_at_end)

    def _state(self) -> LogicalState:
        return LogicalState(self.model, self.optimizer.named_state(), self.mesh)

    # ---- going on

    def restore(self, counters: Counters, message: Callable[[str], None]) -> None:
        """Go on from what `checkpoint.resume` names, or leave everything as it is when there is nothing.

        From then on the job has begun, and its next starts go on from what it saves itself.
        `message` tells people on rank 0. Raises CheckpointError on every rank, before any weight has changed.
        """
        resume = self.place.resume
        found = None if resume == "never" else self.checkpoints.find(resume, self._warn)
        if self.mesh.rank == 0:
            for name in self.checkpoints.clean_up():
                logger.warning("%s: a save that was cut short; removed", name)
        if found is not None:
            self._go_on_from(found, counters, message)
        self._begin(found)

    def _go_on_from(self, found: Found, counters: Counters, message: Callable[[str], None]) -> None:
        loaded = self.checkpoints.read_state(found)
        try:
            self._go_on_with(loaded, counters, message)
        except (KeyError, TypeError, AttributeError, IndexError) as error:  # of the right form, and nonsense
            text = f"{loaded.found}/{STATE_FILE}: this run cannot go on from it: {type(error).__name__}: {error}"
            raise CheckpointError(text) from error
        self._read(loaded, self.place.load_optimizer)
        if not self.place.load_optimizer:
            message("the optimizer's moments start afresh (checkpoint.load_optimizer=false)")
        self.saved_step = counters.step
        message(f"resumed from {found} at step {counters.step}")

    def _go_on_with(self, loaded: Loaded, counters: Counters, message: Callable[[str], None]) -> None:
        """All but the tensors."""
        self._compare(loaded, message)
        self._go_on_with_data(loaded, message)
        state = loaded.trainer_state
        for name in vars(counters).keys() & state["counters"].keys():
            setattr(counters, name, state["counters"][name])
        self._go_on_to_the_end(loaded, counters.step, message)
        self.acting.load_state_dict(state.get("acting"))

    def _begin(self, found: Found | None) -> None:
        """Set aside what is not of this run's past, and note that the job has begun."""
        ours = found.step if found is not None and same_place(found.storage, self.checkpoints.storage) else -1
        for step, now in self.mesh.ask_rank_zero(lambda: self.checkpoints.set_aside_after(ours)):
            kept = f"kept as {now}" if now else "is in the way of a new one; remove it"
            what = "later than where the run goes on" if ours >= 0 else "of another run"
            self._warn(f"checkpoint-{step} is {what}: {kept}")
        if self.place.lock is not None:
            self.place.lock.note_begun(self.place.names)

    def _read(self, loaded: Loaded, moments: bool = True) -> None:
        if moments:
            self.optimizer.create_state()
        self.checkpoints.read_tensors(loaded, self._state() if moments else LogicalState(self.model, (), self.mesh))
        self.optimizer.follow_masters()

    def _compare(self, loaded: Loaded, message: Callable[[str], None]) -> None:
        """Show what is configured otherwise than in the checkpoint; refuse what changes the arithmetic."""
        layout = loaded.manifest.layout
        saved_dp = layout["edp"] * layout["ep"]
        now = self.config.model_dump(mode="json")
        found = changes(loaded.trainer_state["config"], now, saved_dp, self.mesh.layout.dp_size)
        serious = [change for change in found if not change.free]
        if serious and not self.config.checkpoint.allow_config_change:
            raise CheckpointError(
                f"{'; '.join(map(str, serious))}: {loaded.found} was trained otherwise; set it back, or go on with "
                "checkpoint.allow_config_change=true, or start afresh with checkpoint.resume=never"
            )
        told = [change for change in found if not change.key.startswith(("monitor.", "launch.", "checkpoint."))]
        if told:
            message(f"configured otherwise than {loaded.found.folder}: {'; '.join(map(str, told))}")

    def _go_on_with_data(self, loaded: Loaded, message: Callable[[str], None]) -> None:
        """Raises CheckpointError when the samples come in another order than they did, unless that is allowed."""
        saved = loaded.trainer_state["data"]
        change = self.loader.order_change(saved)
        if change is not None and not self.config.checkpoint.allow_config_change:
            raise CheckpointError(
                f"{change}: some samples would be repeated and others left out; set it back, or go on in the new order "
                "with checkpoint.allow_config_change=true"
            )
        self.loader.load_state_dict(saved if change is None else self.loader.recounted(saved))
        if change is not None:
            message(f"{change}: goes on after {self.loader.samples_consumed} samples of the new order")

    def _go_on_to_the_end(self, loaded: Loaded, step: int, message: Callable[[str], None]) -> None:
        """The end of the run and its schedule, in today's steps; a change of it by the batch or the data is said."""
        layout, state = loaded.manifest.layout, loaded.trainer_state
        batch = global_batch(state["config"], layout["edp"] * layout["ep"])
        saved = Pace(batch, state["data"].get("num_samples"))
        self.stopping.load_state_dict(state["stopping"], saved)
        before = Stopping(self.config.train, saved)
        before.go_on(step, state["data"]["samples_consumed"])
        self.stopping.go_on(step, self.loader.samples_consumed)
        if before.max_steps != self.stopping.max_steps:
            words = [
                f"{name}={now} (saved with {then})"
                for name, now, then in zip(
                    ("global batch size", "samples in an epoch"), self.stopping.pace, saved, strict=True
                )
                if now != then
            ]
            message(
                f"{', '.join(words)}: epochs are counted in samples, the run ends at step {self.stopping.max_steps}, "
                f"not {before.max_steps}; the learning rate goes on where it was"
            )

    def _warn(self, text: str) -> None:
        if self.mesh.rank == 0:
            logger.warning("%s", text)

    def load_best(self) -> Found | None:
        """Take the weights of the best checkpoint (and its optimizer's state); None when there is none."""
        name = self.config.checkpoint.metric_for_best_model
        assert name is not None
        metrics = self.mesh.ask_rank_zero(lambda: self.checkpoints.metrics(name))
        if not metrics:
            return None
        sign = -1.0 if self.config.checkpoint.greater_is_better else 1.0
        for step in sorted(metrics, key=lambda step: (sign * metrics[step], -step)):
            found = Found(self.checkpoints.storage, step)
            wrong = self.checkpoints.verify(found)
            if not wrong:
                self._read(self.checkpoints.read_state(found))
                return found
            self._warn(f"{found} is not used: {wrong[0]}")
        return None

    # ---- saving

    def check_room(self) -> None:
        """Raises CheckpointError on every rank when one checkpoint would not fit where checkpoints go."""
        if not self.is_on:
            return
        weights = parameter_counts(self.config.model).total
        num_bytes = weights * 4 * (1 + moments(self.config.optimizer))
        storage = self.checkpoints.storage
        self.mesh.ask_rank_zero(lambda: check_room(storage, num_bytes))

    def is_due(self, step: int) -> bool:
        """Whether a save belongs after this step. One that fails is tried again at the next such step."""
        every = self.config.checkpoint.save_steps
        return bool(every) and step % every == 0 and step != self.saved_step

    def save(self, counters: Counters, metrics: dict[str, float]) -> Outcome | None:
        """Begin to save (collective). Returns how the save before it ended, when that was still being written.

        With `checkpoint.when_busy=skip` nothing is begun then.
        """
        before = None
        if self.checkpoints.in_flight:
            if self.config.checkpoint.when_busy == "skip":
                self._warn(f"step {counters.step}: not saved, the checkpoint before is still being written")
                return None
            before = self.settle()
        self.saved_step = counters.step
        trainer_state: dict[str, Any] = {
            "counters": vars(counters),
            "stopping": self.stopping.state_dict(),
            "data": self.loader.state_dict(),
            "acting": self.acting.state_dict(),
            "config": self.config.model_dump(mode="json"),
        }
        self.checkpoints.begin(counters.step, self._state(), trainer_state, metrics)
        return before

    def settle(self) -> Outcome:
        """Wait for the save in flight (collective)."""
        outcome = self.checkpoints.settle(self._alive)
        if outcome.error is not None:
            if self.saved_step == outcome.step:
                self.saved_step = -1
            logger.warning("checkpoint of step %d failed: %s", outcome.step, outcome.error)
        return outcome

    @property
    def folder(self) -> Path | str:
        """Where checkpoints go."""
        return self.checkpoints.storage.where
