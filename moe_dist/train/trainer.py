"""Build the parts, then loop: the same code in one process, under torchrun, and for every layout."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.lock import Job
from moe_dist.checkpoint.manager import Checkpoints
from moe_dist.config import Config, ModelConfig
from moe_dist.config.host_cache import cache_folder
from moe_dist.config.trained_weights import ChosenExperts, TrainedWeights
from moe_dist.models.adapter_shapes import sentence
from moe_dist.models.quantized import bytes_sentence
from moe_dist.models.trained_counts import trained_sentence
from moe_dist.models.transformer import Transformer
from moe_dist.monitor.sinks import ConsoleSink
from moe_dist.monitor.train_log import log_path
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.device import set_deterministic
from moe_dist.parallel.engines.registry import build_engine
from moe_dist.parallel.layout import refuse_unplanned
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.state_bytes import trained_of_places
from moe_dist.parallel.status import Status
from moe_dist.pretrained.adapters import load_adapter
from moe_dist.pretrained.loading import load_pretrained
from moe_dist.train.auto_balance import AutoBalance
from moe_dist.train.balance import Balancer
from moe_dist.train.build import build_datasets, build_loader, build_model, given
from moe_dist.train.callbacks import Callback, Callbacks, Event, load_callbacks
from moe_dist.train.checkpointing import Persistence, checkpoints_of
from moe_dist.train.counters import Counters
from moe_dist.train.esft import experts_of_task
from moe_dist.train.evaluation import Evaluating
from moe_dist.train.first_step import FirstStep
from moe_dist.train.init_distributed import own_mesh
from moe_dist.train.loop import TrainingLoop
from moe_dist.train.merging import merge
from moe_dist.train.placing import Placing
from moe_dist.train.rank_sync import StopRequests
from moe_dist.train.reference import StartReference
from moe_dist.train.reporting import Reporter, peak_memory, sinks_of
from moe_dist.train.result import TrainingResult
from moe_dist.train.run_setup import (
    architecture_of,
    log_skipped_documents,
    merge_config,
    one_of,
    run_info,
    starts_afresh,
    starts_from_pretrained,
    take_run_folder,
)
from moe_dist.train.saving import Saving
from moe_dist.train.step import StepResult, TrainStep
from moe_dist.train.stopping import Pace, Stopping

logger = logging.getLogger("moe_dist")


class MoETrainer(TrainingLoop):
    """Trains what a configuration describes.

        MoETrainer("configs/demo.yaml", output_dir="outputs/try").train()

    `config`: a `Config`, a path to a YAML file, or a mapping of sections; over it `model_config` and
    `training_config` (a mapping with keys of any section, or a `transformers.TrainingArguments`, whose values are taken
    as they are). `model` and `args` are these two under Hugging Face's names; `model` may also be a `Transformer`,
    whose weights are then trained where they are, in one process. `callbacks` (`moe_dist.train.Callback`) are told what
    happens, after those of `train.callbacks`. `mesh`: this rank's place; by default the process it
    is called in, on `launch.device`, or all ranks of a program that torchrun has started. `launch.nproc_per_node` is
    for `moe-dist train`: from Python nothing is started. `job`: which starts belong together; by default this one
    stands alone. `opened` is told this rank's log file once there is one.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        model_config: Mapping[str, Any] | None = None,
        training_config: Any = None,
        output_dir: str | os.PathLike[str] | None = None,
        model: Transformer | ModelConfig | Mapping[str, Any] | None = None,
        args: Any = None,
        callbacks: Iterable[Callback] = (),
        mesh: Mesh | None = None,
        stop_requests: StopRequests | None = None,
        status: Status | None = None,
        job: Job | None = None,
        opened: Callable[[Path], object] = lambda path: None,
    ) -> None:
        model_config = one_of("model", architecture_of(model), "model_config", model_config)
        training_config = one_of("args", args, "training_config", training_config)
        self.config = merge_config(config, model_config, training_config, output_dir)
        self._given = model if isinstance(model, Transformer) else None
        if mesh is not None:
            self.mesh = mesh
        self.stop_requests = stop_requests or StopRequests()
        self.status = status or Status()
        self.job = job or Job()
        self._persons_callbacks = list(callbacks)
        self._opened = opened
        self.output_dir = self.config.train.output_dir

    def train(self, dataset: Any = None) -> TrainingResult:
        """Run to the end. `dataset`: texts, token lists or a `datasets` dataset instead of the configured source.

        Raises ValueError for a layout that these ranks cannot have, and for what only the data or a checkpoint can
        show to be wrong; MergeError when all is done but for `lora.merge_and_save`. With a `mesh` of somebody's own
        that is theirs to do: `moe_dist.train.merging.merge`, which takes longer than ranks wait for each other.
        """
        if not hasattr(self, "mesh"):
            self.mesh = own_mesh(self.config)
            if self.config.train.auto_find_batch_size:
                logger.warning("train.auto_find_batch_size: only `moe-dist train` starts again with smaller batches")
            result = self._train(dataset)
            merged = merge(self.config, result, self.status, logger.info) if self.mesh.rank == 0 else None
            return replace(result, merged=merged)
        return self._train(dataset)

    def _train(self, dataset: Any) -> TrainingResult:
        refuse_unplanned(self.config, self.mesh.layout.world_size)
        if dataset is not None:
            self.config.data = given(self.config.data)
        self.start = take_run_folder(self.config, self.mesh, self.job)
        self.first_step = FirstStep(ConsoleSink(self.config.monitor.progress).message)
        try:
            if self.mesh.rank == 0:
                self.first_step.begin()
            self._build(dataset)
            try:
                self.persistence.restore(self.counters, self.reporter.sinks.message)
                self.step.set_temperature(self.counters.step)
                self.stopping.before_start(self.counters.step, self.loader.epoch, self.counters.elapsed)
                self.evaluating.measure_baseline()
                self.sample_before = None if self.stopping.reason else self.evaluating.sample()
                if self.counters.step and self.stopping.reason:
                    return self._finished_before()
                self._measure_reference()
                self._begin()
                with self.stop_requests:
                    while self.stopping.reason is None:
                        self._one_step()
                    return self._finish()
            finally:
                self.loader.close()
                self.reporter.sinks.close()
        finally:
            self.first_step.done()
            if self.start.lock is not None:
                self.start.lock.leave()

    def _build(self, dataset: Any) -> None:
        config, mesh = self.config, self.mesh
        set_deterministic(config.train.deterministic, config.train.torch_compile)
        persons = [*load_callbacks(config.train.callbacks), *self._persons_callbacks]
        sinks = sinks_of(config, mesh)
        self.first_step.say = sinks.message
        self.first_step.at("reading the data")
        self.clock, self.counters = Clock(mesh.device, self.status), Counters()
        self.datasets = build_datasets(config, dataset, cache_folder() / "tokens")
        num_domains = len(self.datasets.domains)
        self.first_step.at("building the model")
        self.loader = build_loader(config, self.datasets.train, mesh)
        self._memory_before = peak_memory(mesh.device)
        self.model = build_model(config, mesh, self.clock, self._given)
        if self.model.lora is not None:
            sinks.message(sentence(config.model, config.lora))
        pretrained = None
        if starts_from_pretrained(config, mesh, self.start) and self._given is None:
            self.first_step.at("reading the weights it starts from")
            pretrained = load_pretrained(self.model, config.model, mesh)
            sinks.message(str(pretrained))
            self.model.saves_adapters_alone = self.model.lora is not None
            if config.lora.quantize is not None:
                sinks.message(bytes_sentence(self.model))
        if config.lora.from_adapter is not None and starts_afresh(config, mesh, self.start):
            load_adapter(self.model, config, mesh)
            sinks.message(f"adapters start from {config.lora.from_adapter}")
        checkpoints = checkpoints_of(config, mesh, self.start)
        chosen = self._freeze(checkpoints, pretrained is not None or self._given is not None, sinks.message)
        self.engine = build_engine(self.model, config, mesh)
        self.balancer = Balancer(self.model, mesh, config.balance.bias_update_rate, num_domains)
        self.step = TrainStep(self.model, mesh, self.engine, self.balancer, config, self.status)
        self.stopping = Stopping(config.train, Pace(self.loader.global_batch_size, self.loader.samples_per_epoch))
        self.placing = placing = Placing(config, mesh, self.model, self.engine, self.balancer, sinks.message)
        loads, slots = lambda: self.balancer.facts, lambda: placing.slots  # those of the moment
        announce = self._announce("on_log")
        self.reporter = Reporter(config, mesh, self.clock, sinks, loads, announce, num_domains, slots)
        pending, report = self.reporter.collector.pending, self.reporter.actions
        self.acting = AutoBalance(config, mesh, self.balancer, pending, report)
        self.evaluating = Evaluating(
            *(config, self.model, mesh, self.datasets, self.clock),
            is_best=self.stopping.is_best,
            asked_to_stop=self._asked_to_stop,
            paused=self.reporter.paused,
            announce=self._announce("on_evaluate"),
            dpo=self.step.dpo,
        )
        parts = (self.model, self.engine, self.loader, self.stopping, self.acting, self.placing)
        self.persistence = Persistence(config, mesh, *parts, self.start, self.datasets, checkpoints, self.status.alive)
        self.persistence.chosen = chosen
        self.persistence.pretrained = None if pretrained is None else pretrained.provenance
        self.persistence.check_room()
        self.saving = Saving(
            *(config.checkpoint, self.persistence, self.counters, self.stopping, self.status),
            metrics=self.evaluating.metrics,
            paused=self.reporter.paused,
            announce=self._announce("on_save"),
        )
        # In the order of a step: whether it is the last, its line, what follows from that, its evaluation, its save.
        changing = (self.acting, self.placing)
        own = (self.stopping, self.reporter, *changing, self.first_step, self.evaluating, self.saving)
        self.callbacks = Callbacks(own, persons, mesh, self.state, config.train.on_callback_error)
        self.signal: int | None = None
        self.losses: list[float] = []
        self.result, self.rate = StepResult(nan, nan, 0, 0, skipped=False), nan

    def _freeze(
        self, checkpoints: Checkpoints, has_weights: bool, message: Callable[[str], None]
    ) -> ChosenExperts | None:
        """Hold still what is not trained, and say so; returns the experts that `experts:esft` stands for."""
        config, mesh, trained, chosen = self.config, self.mesh, TrainedWeights.of(self.config), None
        if trained.are_measured:
            self.first_step.at("measuring which experts the data's tokens go to")
            data, resume = self.datasets.train, self.start.resume
            chosen = experts_of_task(config, mesh, self.model, data, checkpoints, resume, has_weights, message)
            trained = TrainedWeights.of(config, chosen)
            trained_of_places(config, chosen)
            self.model.freeze(trained)
        if not trained.are_all:
            message(trained_sentence(config, trained))
        return chosen

    def _measure_reference(self) -> None:
        """Of preferences whose reference is the start: what the weights say of all pairs now, or said at step 0."""
        dpo, persistence = self.step.dpo, self.persistence
        self.reference = None
        if dpo is None or self.config.dpo_reference != "start":
            return
        self.first_step.at("measuring the reference")
        self.reference = StartReference(self.config, self.mesh, self.datasets)
        self.reference.prepare(dpo, self.model, self.engine, persistence.reference, self.reporter.sinks.message)
        persistence.reference = self.reference.weights

    def _announce(self, event: Event) -> Callable[[Any], None]:
        return lambda record: self.callbacks.emit(event, record)

    def _begin(self) -> None:
        """All that can be checked is right: the first change in the run folder."""
        self.persistence.begin(self.reporter.sinks.message)
        if self.reference is not None:
            self.reference.keep()
        self._opened(log_path(self.output_dir, self.mesh.rank))
        log_skipped_documents(self.datasets)
        what = (self.config, self.mesh, self.datasets, self.start.run, self.counters, self._memory_before)
        self.reporter.open(run_info(*what, self.persistence.chosen, self.persistence.pretrained))
        self.started = time.perf_counter() - self.counters.elapsed
        self.callbacks.emit("on_run_begin")
        self._do(self.callbacks.requests())
        self.first_step.activity = self.step.where
