"""The run as Prometheus metrics: one immutable snapshot of the latest records, turned into samples when asked.

Nothing is counted or registered while the run goes on: a scrape costs training nothing but the moment in which it
is written. Names are `moe_dist_*` in base units, those of `monitor.metrics`; the only labels are `layer`, `expert` and
`stage`, and those of `moe_dist_run_info`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from moe_dist import __version__
from moe_dist.monitor.expert_stats import load_ratios, used_share
from moe_dist.monitor.health.rules import PATIENCE, Absence, collapse_limit, imbalance_limit
from moe_dist.monitor.metric import Series, metrics_of
from moe_dist.monitor.metrics import LAYER, SINK_SERIES
from moe_dist.monitor.records import (
    ActionRecord,
    CheckpointRecord,
    EvalRecord,
    LayerRecord,
    RanksRecord,
    RunInfo,
    RunSummary,
    TrainRecord,
)
from moe_dist.monitor.sinks.base import Sink

PerExpert = Literal["full", "layer", "top"]
NUM_TOP = 4
"""With `per_expert: top`, this many of the hottest and as many of the coldest experts of each layer."""

COUNTED = tuple(
    metric.name
    for metric in metrics_of(LayerRecord).values()
    if any(series.kind == "counter" and series.labels == LAYER for series in metric.series)
)
"""Fields of a layer whose sum is shown."""


@dataclass(frozen=True)
class Snapshot:
    """All that a scrape reads. Replaced as a whole, never changed: a scrape in another thread sees one moment."""

    started: float
    logging_steps: int
    info: RunInfo | None = None
    save_steps: int = 0
    train: TrainRecord | None = None
    train_time: float = 0.0
    evaluation: EvalRecord | None = None
    evaluation_time: float = 0.0
    checkpoint: CheckpointRecord | None = None
    checkpoint_time: float = 0.0
    num_checkpoints: int = 0
    num_failed_checkpoints: int = 0
    num_actions: int = 0
    tokens: Mapping[int, tuple[int, ...]] | None = None
    """(token, expert) pairs of every expert since this start of the run, by layer."""
    totals: Mapping[str, Mapping[int, int]] | None = None
    """Fields of the layers that are counters: their sums since this start of the run, by field and layer."""
    dead: Mapping[int, int] | None = None
    """Experts of each layer that have had no token for PATIENCE intervals."""
    finished: bool = False


class SnapshotSink(Sink):
    """Keeps a snapshot of the latest records; `metrics` is the collector that shows it."""

    def __init__(self, logging_steps: int, per_expert: PerExpert) -> None:
        self.snapshot = Snapshot(time.time(), logging_steps)
        self.metrics = RunMetrics(self, per_expert)
        self._absence: dict[int, Absence] = defaultdict(Absence)

    def open(self, info: RunInfo) -> None:
        settings: Any = yaml.safe_load(info.config_text) or {}
        save_steps = settings.get("checkpoint", {}).get("save_steps", 0)
        self.snapshot = replace(self.snapshot, info=info, save_steps=save_steps)

    def train(self, record: TrainRecord) -> None:
        before = self.snapshot.tokens or {}
        tokens = {layer.layer: _added(before.get(layer.layer), layer) for layer in record.layers}
        totals = {}
        for name in COUNTED:
            so_far = (self.snapshot.totals or {}).get(name, {})
            totals[name] = {layer.layer: so_far.get(layer.layer, 0) + getattr(layer, name) for layer in record.layers}
        dead = dict(self.snapshot.dead or {})
        for layer in record.layers:
            if any(layer.tokens_per_expert):
                absent = self._absence[layer.layer].observe(layer.tokens_per_expert)
                dead[layer.layer] = sum(intervals >= PATIENCE for intervals in absent.values())
        self.snapshot = replace(
            self.snapshot, train=record, train_time=time.time(), tokens=tokens, totals=totals, dead=dead
        )

    def evaluation(self, record: EvalRecord) -> None:
        self.snapshot = replace(self.snapshot, evaluation=record, evaluation_time=time.time())

    def checkpoint(self, record: CheckpointRecord) -> None:
        seen = self.snapshot
        if record.ok:
            count = seen.num_checkpoints + 1
            self.snapshot = replace(seen, checkpoint=record, checkpoint_time=time.time(), num_checkpoints=count)
        else:
            self.snapshot = replace(seen, num_failed_checkpoints=seen.num_failed_checkpoints + 1)

    def action(self, record: ActionRecord) -> None:
        self.snapshot = replace(self.snapshot, num_actions=self.snapshot.num_actions + record.applied)

    def summary(self, summary: RunSummary) -> None:
        self.snapshot = replace(self.snapshot, finished=not summary.failed)


def _added(before: tuple[int, ...] | None, layer: LayerRecord) -> tuple[int, ...]:
    counts = layer.tokens_per_expert
    return tuple(map(sum, zip(before, counts, strict=True))) if before else tuple(counts)


class RunMetrics:
    """A collector of `prometheus_client` without state: every scrape reads the sink's snapshot once."""

    def __init__(self, sink: SnapshotSink, per_expert: PerExpert) -> None:
        self._sink, self._per_expert = sink, per_expert

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known without a first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        seen = self._sink.snapshot
        yield from _of_the_run(seen)
        if seen.train is not None:
            for metric in metrics_of(TrainRecord).values():
                for series in metric.series:
                    # As the experts' tokens: a counter that went on from a checkpoint would fall, and count twice.
                    counts = series.kind == "counter" and seen.info is not None
                    before = getattr(seen.info, f"start_{metric.name}") if counts else 0
                    for key, value in metric.shown(seen.train):
                        yield _family(replace(series, name=series.name.format(key)), {(): value - before})
        for record in (seen.evaluation, seen.checkpoint):
            for metric in metrics_of(type(record)).values() if record is not None else ():
                for series in metric.series:
                    for key, value in metric.shown(record):
                        yield _family(replace(series, name=series.name.format(key)), {(): value})
        if seen.info is not None and seen.train is not None and seen.train.ranks is not None:
            yield from _of_stages(seen.info, seen.train.ranks)
        # A layer that routed nothing in the interval has no ratios, and its experts are not dead.
        layers = [layer for layer in seen.train.layers if any(layer.tokens_per_expert)] if seen.train else []
        if layers:
            yield from _of_layers(layers, seen)
            if self._per_expert != "layer":
                yield from _of_experts(layers, seen.tokens or {}, self._per_expert)


def _of_the_run(seen: Snapshot) -> Iterator[Metric]:
    """What the sink knows by itself, and no record."""
    if seen.info is not None:
        names = ("run_id", "output_dir", "device", "world_size", "total_params", "active_params")
        labels = {name: str(getattr(seen.info, name)) for name in names}
        yield InfoMetricFamily("moe_dist_run", SINK_SERIES["run"].help, value={"version": __version__} | labels)
    values = {
        "run_start_timestamp_seconds": seen.started,
        "run_finished": float(seen.finished),
        "logging_interval_steps": seen.logging_steps,
        "checkpoint_interval_steps": seen.save_steps or None,
        "last_step_timestamp_seconds": None if seen.train is None else seen.train_time,
        "last_evaluation_timestamp_seconds": None if seen.evaluation is None else seen.evaluation_time,
        "last_checkpoint_timestamp_seconds": None if seen.checkpoint is None else seen.checkpoint_time,
        "checkpoints": seen.num_checkpoints,
        "checkpoint_failures": seen.num_failed_checkpoints,
        "actions": seen.num_actions,
    }
    yield from (_family(SINK_SERIES[name], {(): value}) for name, value in values.items() if value is not None)


def _of_stages(info: RunInfo, ranks: RanksRecord) -> Iterator[Metric]:
    """Time and memory by pipeline stage (stage 0 is all there is without a pipeline), and which layer is where."""
    stages = sorted(set(info.stage_of_rank))
    members = {stage: [rank for rank, of_rank in enumerate(info.stage_of_rank) if of_rank == stage] for stage in stages}
    for metric in metrics_of(RanksRecord).values():
        for series in metric.series:
            values, reduce = getattr(ranks, metric.name), metric.reduce
            assert reduce is not None, metric.name
            by_stage = {stage: reduce([values[rank] for rank in members[stage]]) for stage in stages}
            yield _family(series, {(str(stage),): value for stage, value in by_stage.items()})
    layers = InfoMetricFamily("moe_dist_layer", SINK_SERIES["layer"].help, labels=["layer"])
    for layer, stage in enumerate(info.stage_of_layer):
        layers.add_metric([str(layer)], {"stage": str(stage)})
    yield layers


def _of_layers(layers: list[LayerRecord], seen: Snapshot) -> Iterator[Metric]:
    for metric in metrics_of(LayerRecord).values():
        for series in metric.series:
            if series.labels == LAYER:
                values = {layer.layer: getattr(layer, metric.name) for layer in layers}
                if series.kind == "counter":
                    values = {number: (seen.totals or {})[metric.name][number] for number in values}
                yield _family(series, {(str(number),): value for number, value in values.items()})
    dead = seen.dead or {}
    computed: dict[str, Callable[[LayerRecord], float]] = {
        "used_experts_ratio": used_share,
        "used_experts_limit_ratio": collapse_limit,
        "load_imbalance_limit_ratio": imbalance_limit,
        "lasting_dead_experts": lambda layer: dead[layer.layer],
    }
    for name, of in computed.items():
        yield _family(SINK_SERIES[name], {(str(layer.layer),): of(layer) for layer in layers})


def _of_experts(
    layers: list[LayerRecord], tokens: Mapping[int, tuple[int, ...]], per_expert: PerExpert
) -> Iterator[Metric]:
    shown = [*metrics_of(LayerRecord)["tokens_per_expert"].series, *metrics_of(LayerRecord)["expert_ranks"].series]
    of_expert: dict[str, dict[tuple[str, ...], float]] = {series.name: {} for series in shown}
    for layer in layers:
        ratios, name = load_ratios(layer), str(layer.layer)
        for expert in _shown(ratios, per_expert):
            of_expert["expert_tokens"][name, str(expert)] = tokens[layer.layer][expert]
            of_expert["expert_load_ratio"][name, str(expert)] = ratios[expert]
            if layer.expert_ranks:
                of_expert["expert_rank"][name, str(expert)] = layer.expert_ranks[expert]
    yield from (_family(series, of_expert[series.name]) for series in shown if of_expert[series.name])


def _shown(ratios: list[float], per_expert: PerExpert) -> Iterable[int]:
    """The experts with series of their own."""
    if per_expert == "full" or len(ratios) <= 2 * NUM_TOP:
        return range(len(ratios))
    by_load = sorted(range(len(ratios)), key=ratios.__getitem__)
    return sorted(by_load[:NUM_TOP] + by_load[-NUM_TOP:])


def _family(series: Series, values: Mapping[tuple[str, ...], float]) -> Metric:
    """A family with a sample for each tuple of labels."""
    kind: Any = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
    family = kind(f"moe_dist_{series.name}", series.help, labels=series.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family
