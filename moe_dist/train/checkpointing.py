"""The run's state on disk: what is saved and when, and what a run goes on from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.checkpoint.config_diff import global_batch
from moe_dist.checkpoint.manager import Checkpoints, Loaded, Outcome, check_room
from moe_dist.checkpoint.reading import CheckpointRef
from moe_dist.checkpoint.run_folder import move_earlier_run
from moe_dist.checkpoint.shapes import MODEL
from moe_dist.checkpoint.storage import open_storage, same_storage, step_folder
from moe_dist.checkpoint.storage.manifest import STATE_FILE, CheckpointError
from moe_dist.config import Config, ModelConfig
from moe_dist.config.huggingface import architecture_differences
from moe_dist.config.trained_weights import ChosenExperts, TrainedWeights
from moe_dist.data.loader import GlobalLoader
from moe_dist.models.adapter_shapes import adapter_counts
from moe_dist.models.counts import parameter_counts
from moe_dist.models.trained_counts import trained_counts
from moe_dist.models.transformer import Transformer
from moe_dist.monitor.train_log import open_log
from moe_dist.parallel.engines.base import Engine
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.state_bytes import moments
from moe_dist.train.auto_balance import AutoBalance
from moe_dist.train.build import Datasets
from moe_dist.train.counters import Counters
from moe_dist.train.esft import to_json
from moe_dist.train.placing import Placing
from moe_dist.train.resume_checks import check_config, check_data, check_model, check_reference, data_change, end_change
from moe_dist.train.run_setup import RunStart, write_config
from moe_dist.train.stopping import Pace, Stopping

if TYPE_CHECKING:
    from moe_dist.checkpoint.state import LogicalState

logger = logging.getLogger("moe_dist")


def checkpoints_of(config: Config, mesh: Mesh, start: RunStart) -> Checkpoints:
    """Of the run, where `checkpoint.folder` says."""
    checkpoint = config.checkpoint
    return Checkpoints(
        open_storage(checkpoint.folder or config.train.output_dir),
        mesh,
        checkpoint,
        start.run,
        start.generation,
        start.lock,
        config.parallel.zero_stage,
        start.load_optimizer,
        start.earlier,
    )


class Persistence:
    """Saves and restores model, optimizer, data position, schedules and counters; the same calls on every rank."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        model: Transformer,
        engine: Engine,
        loader: GlobalLoader,
        stopping: Stopping,
        acting: AutoBalance,
        placing: Placing,
        start: RunStart,
        datasets: Datasets,
        checkpoints: Checkpoints,
        alive: Callable[[], None],
    ) -> None:
        """`alive` is called while a save that training waits for makes progress."""
        self.config, self.mesh, self.model, self.engine = config, mesh, model, engine
        self.loader, self.stopping, self.acting, self._alive = loader, stopping, acting, alive
        self.placing = placing
        self.start, self.checkpoints = start, checkpoints
        self._corpus: dict[str, Any] = mesh.ask_rank_zero(lambda: datasets.identities(config.num_evaluated))
        self.chosen: ChosenExperts | None = None
        """Experts that `experts:esft` stands for."""
        self.pretrained: dict[str, Any] | None = None
        """What the weights of step 0 were read from, of this start or of the one that the checkpoint is of."""
        self.reference: str | None = None
        """Of preferences: hash of the weights of step 0, of which there are log-probabilities in the run folder."""
        self.saved_step = -1
        """Step of the last save begun, or of the checkpoint the run goes on from."""
        self.goes_on_from: str | None = None
        """The checkpoint that this start goes on from, for people."""
        self._goes_on_after = -1
        """Step of the checkpoint in the run's own storage that it goes on from; -1: from none of those."""

    @property
    def is_on(self) -> bool:
        """Whether this run saves at all."""
        return bool(self.config.checkpoint.save_steps or self.config.checkpoint.save_at_end)

    def _state(self, moments: bool = True) -> LogicalState:
        from moe_dist.checkpoint.state import LogicalState  # torch's planners take long to import

        return LogicalState(self.model, self.engine, self.mesh, moments)

    # ---- going on

    def restore(self, counters: Counters, message: Callable[[str], None]) -> None:
        """Go on from what `checkpoint.resume` names, or leave everything as it is when there is nothing.

        On disk nothing is changed before `begin`. `message` tells people on rank 0. Raises CheckpointError on every
        rank, before any weight has changed.
        """
        resume = self.start.resume
        found = None if resume == "never" else self.checkpoints.find(resume, self._warn)
        owner = self.checkpoints.owner
        if found is not None:
            loaded = self._go_on_from(found, counters, message)
            self.goes_on_from = str(found)
            if same_storage(found.storage, owner.storage):
                owner.run, self._goes_on_after = loaded.manifest.run, found.step
        self.mesh.ask_rank_zero(lambda: owner.later(self._goes_on_after))  # what `begin` would refuse, it refuses now

    def begin(self, message: Callable[[str], None]) -> None:
        """The first change on disk: what is not of this run's past is set aside, and the job has begun (collective).

        From then on its next starts go on from what it saves itself. Raises CheckpointError on every rank.
        """

        def settle() -> tuple[list[str], str | None, list[tuple[int, str | None]]]:
            try:
                return self._settle()
            except OSError as error:
                folder = self.config.train.output_dir
                raise CheckpointError(f"train.output_dir={folder}: cannot be written to: {error.strerror}") from error

        removed, moved, aside = self.mesh.ask_rank_zero(settle)
        open_log()
        for name in removed:
            self._warn(f"{name}: a save that was cut short; removed")
        if moved is not None:
            message(f"the run that was here is kept in {moved}")
        if aside:
            names = ", ".join(step_folder(step) for step, _ in aside)
            kept = ", ".join(now for _, now in aside if now)
            what = "later than where the run goes on" if self._goes_on_after >= 0 else "not of this run"
            done = f"kept as {kept}" if kept else "in the way of new ones; remove them"
            self._warn(f"{names} in {self.folder}: {what}, and {done}")

    def _settle(self) -> tuple[list[str], str | None, list[tuple[int, str | None]]]:
        owner, lock, folder = self.checkpoints.owner, self.start.lock, self.config.train.output_dir
        later = owner.later(self._goes_on_after)
        removed = owner.clean_up()
        moved = move_earlier_run(folder) if self.start.resume == "never" else None
        aside = owner.set_aside(later)
        if lock is not None:
            lock.begin(owner.run, self.start.names)
            owner.claim()
            if self.start.resume == "never":
                lock.note(None)
        write_config(self.config, owner.run)
        return removed, None if moved is None else str(moved), aside

    def _go_on_from(self, found: CheckpointRef, counters: Counters, message: Callable[[str], None]) -> Loaded:
        loaded = self.checkpoints.read_state(found)
        if loaded.is_imported:
            return self._start_with(loaded, message)
        try:
            self._go_on_with(loaded, counters, message)
        except (KeyError, TypeError, AttributeError, IndexError) as error:  # of the right form, and nonsense
            text = f"{loaded.checkpoint}/{STATE_FILE}: this run cannot go on from it: {type(error).__name__}: {error}"
            raise CheckpointError(text) from error
        self._read(loaded, self.start.load_optimizer)
        if not self.start.load_optimizer:
            message("the optimizer's moments start afresh (checkpoint.load_optimizer=false)")
        self.saved_step = counters.step
        message(f"resumed from {found} at step {counters.step}")
        return loaded

    def _start_with(self, loaded: Loaded, message: Callable[[str], None]) -> Loaded:
        """The first weights out of a checkpoint that no trainer has written: all else is as in a new run."""
        saved = ModelConfig.model_validate(loaded.trainer_state["config"]["model"])
        if wrong := architecture_differences(self.config.model, saved):
            raise CheckpointError(f"{loaded.checkpoint}: the run's model is another: {', '.join(wrong)}")
        self.pretrained = loaded.trainer_state.get("pretrained")
        self._read(loaded, moments=False)
        self.saved_step = 0
        origin = (self.pretrained or {}).get("folder")
        message(f"starts from {loaded.checkpoint}" + (f", the weights of {origin}" if origin else ""))
        return loaded

    def _go_on_with(self, loaded: Loaded, counters: Counters, message: Callable[[str], None]) -> None:
        """All but the tensors."""
        check_config(loaded, self.config, self.mesh.layout.dp_size, message)
        check_reference(loaded, self.config, self._adapters)
        self._go_on_with_data(loaded, message)
        state = loaded.trainer_state
        for name in vars(counters).keys() & state["counters"].keys():
            setattr(counters, name, state["counters"][name])
        self._go_on_to_the_end(loaded, counters.step, message)
        self.acting.load_state_dict(state.get("acting"))
        self.placing.load_state_dict(state.get("placement"))
        if self.model.saves_adapters_alone:
            check_model(loaded, self.pretrained)
        self.pretrained, self.reference = state.get("pretrained"), state.get("reference")

    @property
    def _adapters(self) -> set[str]:
        """Names in a checkpoint of what is trained beside a frozen model."""
        trained = {f"{MODEL}{name}" for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return trained if self.model.lora is not None else set()

    def _read(self, loaded: Loaded, moments: bool = True) -> None:
        with self.placing.at_home():
            state, adapters = self._state(moments), self._adapters
            if adapters and not moments and not adapters & loaded.manifest.tensors.keys():
                state.leave_out(adapters)  # of a run that had none: they start afresh beside its weights
            self.checkpoints.read_tensors(loaded, state)
            self.engine.state_loaded()

    def _go_on_with_data(self, loaded: Loaded, message: Callable[[str], None]) -> None:
        """Raises CheckpointError when the data is not what it was, or in another order, unless that is allowed."""
        saved = loaded.trainer_state["data"]
        order = self.loader.order_change(saved)
        check_data(loaded, self._corpus, order, self.config, self._warn)
        self.loader.load_state_dict(saved if order is None else self.loader.recounted(saved))
        if order is not None:
            message(f"{order}: goes on after {self.loader.samples_consumed} samples of the new order")

    def _go_on_to_the_end(self, loaded: Loaded, step: int, message: Callable[[str], None]) -> None:
        """The end of the run and its schedule, in today's steps; a change of it by the batch or the data is said."""
        layout, state = loaded.manifest.layout, loaded.trainer_state
        batch = global_batch(state["config"], layout["edp"] * layout["ep"])
        saved = Pace(batch, state["data"].get("num_samples"))
        self.stopping.load_state_dict(state["stopping"], saved)
        if (other := data_change(loaded, self._corpus, "validation")) is not None:
            self.stopping.forget_evaluations()
            message(f"the validation data is not what it was: {other}; the best loss is counted anew")
        before = Stopping(self.config.train, saved)
        before.go_on(step, state["data"]["samples_consumed"])
        self.stopping.go_on(step, self.loader.samples_consumed)
        if (text := end_change(before, self.stopping)) is not None:
            message(text)

    def _warn(self, text: str) -> None:
        if self.mesh.rank == 0:
            logger.warning("%s", text)

    def load_best(self) -> CheckpointRef | None:
        """Take the weights of the best checkpoint (and its optimizer's state); None when there is none."""
        name = self.config.checkpoint.metric_for_best_model
        assert name is not None
        metrics = self.mesh.ask_rank_zero(lambda: self.checkpoints.owner.metrics(name))
        if not metrics:
            return None
        sign = -1.0 if self.config.checkpoint.greater_is_better else 1.0
        for step in sorted(metrics, key=lambda step: (sign * metrics[step], -step)):
            found = CheckpointRef(self.checkpoints.storage, step)
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
        weights, trained = parameter_counts(self.config.model).total, TrainedWeights.of(self.config)
        if self.config.lora.r:
            adapters = sum(adapter_counts(self.config.model, self.config.lora))
            weights = adapters if self.model.saves_adapters_alone else weights + adapters
        num_bytes = 4 * (weights + trained_counts(self.config, trained).total * moments(self.config.optimizer))
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
            "placement": self.placing.state_dict(),
            "corpus": self._corpus,
            "pretrained": self.pretrained,
            "esft": to_json(self.chosen),
            "reference": self.reference,
            "config": self.config.model_dump(mode="json"),
        }
        with self.placing.at_home():  # in files experts are in the order of their ids
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

    def lost(self) -> str | None:
        """Why this start must not write any more (collective): its folder has gone, or is another writer's."""

        def look() -> str | None:
            try:
                self.checkpoints.owner.check()
            except (CheckpointError, OSError) as error:
                return str(error)
            return None

        return self.mesh.ask_rank_zero(look)

    @property
    def folder(self) -> Path | str:
        """Where checkpoints go."""
        return self.checkpoints.storage.where
