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
from moe_dist.config import Config, ModelConfig
from moe_dist.models.transformer import Transformer
from moe_dist.monitor.sinks import ConsoleSink
from moe_dist.monitor.train_log import log_path
from moe_dist.parallel.device import set_deterministic
from moe_dist.parallel.layout import refuse_unplanned
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.status import Status
from moe_dist.train.build import given
from moe_dist.train.callbacks import Callback, Callbacks, Event, load_callbacks
from moe_dist.train.first_step import FirstStep
from moe_dist.train.init_distributed import own_mesh
from moe_dist.train.loop import TrainingLoop
from moe_dist.train.merging import merge
from moe_dist.train.parts import build_parts
from moe_dist.train.rank_sync import StopRequests
from moe_dist.train.result import TrainingResult
from moe_dist.train.run_setup import (
    RunStart,
    architecture_of,
    log_skipped_documents,
    merge_config,
    one_of,
    take_run_folder,
)
from moe_dist.train.step import StepResult

logger = logging.getLogger("moe_dist")


class MoETrainer(TrainingLoop):
    """Trains what a configuration describes.

        MoETrainer("configs/demo.yaml", output_dir="outputs/try").train()

    `config`: a `Config`, a path to a YAML file, or a mapping of sections; over it `model_config` and
    `training_config` (a mapping with keys of any section, or a `transformers.TrainingArguments`, whose values are taken
    as they are). `model` and `args` are these two under Hugging Face's names; `model` may also be a `Transformer`,
    whose weights are then trained where they are, in one process. `callbacks` (`moe_dist.train.Callback`) get every
    event, after those of `train.callbacks`. `mesh`: this rank and its process groups; by default the process it is
    called in, on `launch.device`, or all ranks of a program that torchrun has started. `launch.nproc_per_node` is
    for `moe-dist train`: from Python nothing is started. `job`: which starts belong together; by default this one
    stands alone. `opened` is called with this rank's log file once there is one.
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

    @property
    def model(self) -> Transformer:
        """This rank's part of the model, once `train` has built it."""
        return self.parts.model

    def _train(self, dataset: Any) -> TrainingResult:
        refuse_unplanned(self.config, self.mesh.layout.world_size)
        if dataset is not None:
            self.config.data = given(self.config.data)
        start = take_run_folder(self.config, self.mesh, self.job)
        self.first_step = FirstStep(ConsoleSink(self.config.monitor.progress).message)
        try:
            if self.mesh.rank == 0:
                self.first_step.begin()
            self._build(start, dataset)
            try:
                self._restore()
                if self.parts.counters.step and self.parts.stopping.reason:
                    return self._finished_before()
                self._measure_reference()
                self._begin()
                with self.stop_requests:
                    while self.parts.stopping.reason is None:
                        self._one_step()
                    return self._finish()
            finally:
                self.parts.loader.close()
                self.parts.reporter.sinks.close()
        finally:
            self.first_step.done()
            if start.lock is not None:
                start.lock.leave()

    def _build(self, start: RunStart, dataset: Any) -> None:
        config, mesh = self.config, self.mesh
        set_deterministic(config.train.deterministic, config.train.torch_compile)
        persons = [*load_callbacks(config.train.callbacks), *self._persons_callbacks]
        self.parts = build_parts(
            *(config, mesh, start, self.status, self.first_step),
            dataset=dataset,
            given=self._given,
            announce=self._announce,
            asked_to_stop=self._asked_to_stop,
        )
        self.callbacks = Callbacks(self.parts.callbacks, persons, mesh, self.state, config.train.on_callback_error)
        self.signal = None
        self.losses = []
        self.result, self.rate = StepResult(nan, nan, 0, 0, skipped=False), nan

    def _announce(self, event: Event) -> Callable[[Any], None]:
        return lambda record: self.callbacks.emit(event, record)

    def _restore(self) -> None:
        """Go on from a checkpoint if there is one, and measure what training is held against."""
        parts, counters = self.parts, self.parts.counters
        parts.persistence.restore(counters, parts.reporter.sinks.message)
        parts.step.start_at(counters.step)
        parts.stopping.before_start(counters.step, parts.loader.epoch, counters.elapsed)
        parts.evaluating.measure_baseline()
        self.sample_before = None if parts.stopping.reason else parts.evaluating.sample()

    def _measure_reference(self) -> None:
        """Of preferences whose reference is the start: what the weights say of all pairs now, or said at step 0."""
        parts, reference = self.parts, self.parts.reference
        if reference is None or parts.step.dpo is None:
            return
        self.first_step.at("measuring the reference")
        persistence, message = parts.persistence, parts.reporter.sinks.message
        reference.prepare(parts.step.dpo, parts.model, parts.engine, persistence.reference, message)
        persistence.reference = reference.weights

    def _begin(self) -> None:
        """All that can be checked is right: the first change in the run folder."""
        parts = self.parts
        parts.persistence.begin(parts.reporter.sinks.message)
        if parts.reference is not None:
            parts.reference.keep()
        self._opened(log_path(self.output_dir, self.mesh.rank))
        log_skipped_documents(parts.datasets)
        parts.reporter.open(parts.info(self.config, self.mesh))
        self.started = time.perf_counter() - parts.counters.elapsed
        self.callbacks.emit("on_run_begin")
        self._do(self.callbacks.requests())
        self.first_step.activity = parts.step.where
