"""The parts of a run on one rank, each built of those before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_dist.config import Config
from moe_dist.config.host_cache import cache_folder
from moe_dist.data.loader import GlobalLoader
from moe_dist.models.transformer import Transformer
from moe_dist.monitor.records import RunInfo
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.engines.base import Engine
from moe_dist.parallel.engines.registry import build_engine
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.status import Status
from moe_dist.train.auto_balance import AutoBalance
from moe_dist.train.balance import Balancer
from moe_dist.train.build import Datasets, build_datasets, build_loader
from moe_dist.train.callbacks import Callback, Event
from moe_dist.train.checkpointing import Persistence, checkpoints_of
from moe_dist.train.counters import Counters
from moe_dist.train.evaluation import Evaluating
from moe_dist.train.first_step import FirstStep
from moe_dist.train.placing import Placing
from moe_dist.train.reference import StartReference
from moe_dist.train.reporting import Reporter, peak_memory, sinks_of
from moe_dist.train.run_setup import RunStart, run_info
from moe_dist.train.saving import Saving
from moe_dist.train.starting_model import build_starting_model
from moe_dist.train.step import TrainStep
from moe_dist.train.stopping import Pace, Stopping


@dataclass(frozen=True)
class Parts:
    """What a run lives with."""

    clock: Clock
    counters: Counters
    datasets: Datasets
    loader: GlobalLoader
    model: Transformer
    engine: Engine
    balancer: Balancer
    step: TrainStep
    stopping: Stopping
    placing: Placing
    reporter: Reporter
    acting: AutoBalance
    evaluating: Evaluating
    reference: StartReference | None
    """Of preferences whose reference is the start."""
    persistence: Persistence
    saving: Saving
    callbacks: tuple[Callback, ...]
    """Those of the above that are callbacks, in the order of a step: whether it is the last, its line, what follows
    from that, its evaluation, its save."""
    memory_before: int
    """Peak bytes before there was a model."""

    def info(self, config: Config, mesh: Mesh) -> RunInfo:
        """What is about to run (collective)."""
        saved = self.persistence
        what = (self.datasets, saved.start.run, self.counters, self.memory_before)
        return run_info(config, mesh, *what, saved.chosen, saved.pretrained)


def build_parts(
    config: Config,
    mesh: Mesh,
    start: RunStart,
    status: Status,
    progress: FirstStep,
    *,
    dataset: Any,
    given: Transformer | None,
    announce: Callable[[Event], Callable[[Any], None]],
    asked_to_stop: Callable[[], bool],
) -> Parts:
    """Build all of them (collective); nothing on disk is changed, and no checkpoint read.

    `progress` says what goes on. `dataset`, `given`: data and model of a program. `announce(event)` tells all
    callbacks of it; `asked_to_stop`: whether any rank has been (collective). Raises ValueError on every rank.
    """
    sinks = sinks_of(config, mesh)
    progress.say = sinks.message
    progress.at("reading the data")
    clock, counters = Clock(mesh.device, status), Counters()
    datasets = build_datasets(config, dataset, cache_folder() / "tokens")
    num_domains = len(datasets.domains)
    progress.at("building the model")
    loader = build_loader(config, datasets.train, mesh)
    memory_before = peak_memory(mesh.device)
    checkpoints = checkpoints_of(config, mesh, start)
    model, chosen, provenance = build_starting_model(config, mesh, clock, start, datasets, checkpoints, given, progress)
    engine = build_engine(model, config, mesh)
    balancer = Balancer(model, mesh, config.balance.bias_update_rate, num_domains)
    step = TrainStep(model, mesh, engine, balancer, config, status)
    stopping = Stopping(config.train, Pace(loader.global_batch_size, loader.samples_per_epoch))
    placing = Placing(config, mesh, model, engine, balancer, sinks.message)
    # Those of the moment.
    loads, places = lambda: balancer.facts, (lambda: placing.slots, lambda: placing.copied)
    reporter = Reporter(config, mesh, clock, sinks, loads, announce("on_log"), num_domains, *places)
    acting = AutoBalance(config, mesh, balancer, reporter.collector.pending, reporter.actions)
    evaluating = Evaluating(
        *(config, model, mesh, datasets, clock),
        is_best=stopping.is_best,
        asked_to_stop=asked_to_stop,
        paused=reporter.paused,
        announce=announce("on_evaluate"),
        dpo=step.dpo,
    )
    has_reference = step.dpo is not None and config.dpo_reference == "start"
    reference = StartReference(config, mesh, datasets) if has_reference else None
    saved = (model, engine, loader, stopping, acting, placing)
    persistence = Persistence(config, mesh, *saved, start, datasets, checkpoints, status.alive)
    persistence.chosen, persistence.pretrained = chosen, provenance
    persistence.check_room()
    saving = Saving(
        *(config.checkpoint, persistence, counters, stopping, status),
        metrics=evaluating.metrics,
        paused=reporter.paused,
        announce=announce("on_save"),
    )
    return Parts(
        clock=clock,
        counters=counters,
        datasets=datasets,
        loader=loader,
        model=model,
        engine=engine,
        balancer=balancer,
        step=step,
        stopping=stopping,
        placing=placing,
        reporter=reporter,
        acting=acting,
        evaluating=evaluating,
        reference=reference,
        persistence=persistence,
        saving=saving,
        callbacks=(stopping, reporter, acting, placing, progress, evaluating, saving),
        memory_before=memory_before,
    )
