"""The run as Prometheus metrics: one immutable snapshot of the latest records, turned into samples when asked.

Nothing is counted or registered while the run goes on: a scrape costs training nothing but the moment in which it
is written. Names are `moe_dist_*` in base units; the only labels are `layer`, `expert` and `stage`, and those
of `moe_dist_run_info`. `docs/metrics.md` lists all.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from moe_dist import __version__
from moe_dist.monitor.expert_stats import load_ratios, used_share
from moe_dist.monitor.health.rules import PATIENCE, Absence, collapse_limit, imbalance_limit
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

# Field of a record, metric, help. A field that is None has no sample.
TRAIN_COUNTERS = (
    ("step", "steps", "Optimizer steps finished in this start of the run."),
    ("tokens", "tokens", "Tokens consumed in this start of the run, all ranks."),
    ("skipped_steps", "skipped_steps", "Steps skipped in this start for a non-finite loss or gradient."),
)
TRAIN_GAUGES = (
    ("step", "run_steps", "Optimizer steps finished by the run, over all its starts."),
    ("tokens", "run_tokens", "Tokens consumed by the run, over all its starts, all ranks."),
    ("loss", "train_loss", "Training loss of the last logged step, nats per token."),
    ("loss_std", "train_loss_std", "Standard deviation of the losses of the interval's steps."),
    ("learning_rate", "learning_rate", "Learning rate of the last step."),
    ("grad_norm", "grad_norm", "Global gradient norm before clipping, last step."),
    ("epoch", "epoch", "Passes over the training data."),
    ("max_steps", "max_steps", "Optimizer steps of the whole run."),
    ("tokens_per_second", "tokens_per_second", "Throughput of the last logging interval, all ranks."),
    ("tokens_per_second_per_device", "tokens_per_second_per_device", "Throughput / ranks."),
    ("step_seconds", "step_seconds", "Seconds per optimizer step, mean of the last logging interval."),
    (
        "all_to_all_share",
        "all_to_all_ratio",
        "Share of step time in dispatch and combine, of the rank that waits least.",
    ),
    ("data_wait_share", "data_wait_ratio", "Share of step time waiting for a batch, of the rank that waits longest."),
    ("flops_per_second", "model_flops_per_second", "Floating-point operations the model needs, all ranks."),
    ("samples_per_second", "samples_per_second", "Sequences per second of the last logging interval, all ranks."),
    ("device_utilisation", "device_utilisation_ratio", "Share of the last second in which the GPU had work."),
    ("mfu", "mfu_ratio", "Model FLOP utilisation: model_flops_per_second / peak of all devices."),
    ("all_to_all_bytes", "all_to_all_bytes", "Bytes that all ranks sent to others by all-to-all, per step."),
    (
        "all_to_all_bytes_between_hosts",
        "all_to_all_bytes_between_hosts",
        "The part of them that went to another host.",
    ),
    ("dispatch_seconds", "dispatch_seconds", "Seconds of a step in all-to-all to the experts, mean over ranks."),
    ("combine_seconds", "combine_seconds", "Seconds of a step in all-to-all back home, mean over ranks."),
    ("row_imbalance", "row_imbalance_ratio", "Rows received by the busiest rank / mean; 1: balanced."),
    ("imbalance_seconds", "imbalance_tax_seconds", "Estimated seconds of a step spent waiting for the busiest rank."),
    ("slowest_rank_ratio", "slowest_rank_ratio", "Own seconds of the slowest rank / median of the others."),
    ("memory_bytes", "memory_peak_bytes", "Peak memory of the reporting rank."),
    ("remaining_seconds", "remaining_seconds", "Expected seconds to the end of the run."),
)
EVAL_GAUGES = (
    ("loss", "validation_loss", "Loss on the validation set, nats per token."),
    ("unigram_loss", "validation_unigram_loss", "Validation loss of a model that knows token frequencies only."),
    ("seconds", "evaluation_seconds", "Duration of the last evaluation."),
)
CHECKPOINT_GAUGES = (
    ("step", "last_checkpoint_step", "Optimizer steps in the last complete checkpoint."),
    ("seconds", "checkpoint_seconds", "Duration of the last complete checkpoint."),
    ("blocked_seconds", "checkpoint_blocked_seconds", "Seconds that training waited for the last checkpoint."),
    ("bytes", "checkpoint_bytes", "Size of the last complete checkpoint."),
)
LAYER_GAUGES = (
    ("load_imbalance", "load_imbalance_ratio", "Largest expert load / mean load; 1: balanced."),
    ("load_cv", "load_cv_ratio", "Standard deviation / mean of expert loads; 0: balanced."),
    ("load_entropy", "load_entropy_ratio", "Entropy of expert loads / ln E; 1: balanced."),
    ("dead_experts", "dead_experts", "Experts that no token chose in the last logging interval."),
    ("dropped_fraction", "dropped_ratio", "Share of (token, expert) pairs that found no place."),
    ("aux_loss", "load_balancing_loss", "Load-balancing loss, unweighted; 1: balanced."),
    ("z_loss", "router_z_loss", "Mean squared log-sum-exp of the router's logits, unweighted."),
    ("router_entropy", "router_entropy_nats", "Mean entropy of a token's router scores."),
    ("router_confidence", "router_confidence_ratio", "Mean of the largest of a token's router scores."),
    ("rank_imbalance", "rank_imbalance_ratio", "Load of the busiest rank / mean of ranks; 1: balanced."),
    ("router_logits_rms", "router_logits_rms", "Root mean square of the router's logits."),
)


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
    fallbacks: Mapping[int, int] | None = None
    """Tokens that went to the fallback expert since this start of the run, by layer."""
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
        failed = self.snapshot.fallbacks or {}
        fallbacks = {layer.layer: failed.get(layer.layer, 0) + layer.fallback_tokens for layer in record.layers}
        dead = dict(self.snapshot.dead or {})
        for layer in record.layers:
            if any(layer.tokens_per_expert):
                absent = self._absence[layer.layer].observe(layer.tokens_per_expert)
                dead[layer.layer] = sum(intervals >= PATIENCE for intervals in absent.values())
        self.snapshot = replace(
            self.snapshot, train=record, train_time=time.time(), tokens=tokens, fallbacks=fallbacks, dead=dead
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
            for field, name, text in TRAIN_COUNTERS:
                # As the experts' tokens: a counter that went on from a checkpoint would fall, and count twice.
                before = getattr(seen.info, f"start_{field}") if seen.info else 0
                yield _counter(name, text, getattr(seen.train, field) - before)
            yield from _gauges(TRAIN_GAUGES, seen.train)
            yield _gauge("stragglers", "Ranks that have been slow for 3 intervals.", len(seen.train.stragglers))
            for phase, seconds in seen.train.phase_seconds.items():
                text = "Seconds of the last logging interval in this phase, mean over ranks."
                yield _gauge(f"phase_{phase}_seconds", text, seconds)
            yield _gauge("last_step_timestamp_seconds", "When the last step was logged.", seen.train_time)
        if seen.evaluation is not None:
            yield from _gauges(EVAL_GAUGES, seen.evaluation)
            yield _gauge("last_evaluation_timestamp_seconds", "End of the last evaluation.", seen.evaluation_time)
        yield _counter("checkpoints", "Complete checkpoints of this start of the run.", seen.num_checkpoints)
        yield _counter("checkpoint_failures", "Checkpoints that failed.", seen.num_failed_checkpoints)
        yield _counter("actions", "Automatic changes of balancing in this start of the run.", seen.num_actions)
        if seen.checkpoint is not None:
            yield from _gauges(CHECKPOINT_GAUGES, seen.checkpoint)
            yield _gauge(
                "last_checkpoint_timestamp_seconds", "When the last checkpoint was complete.", seen.checkpoint_time
            )
        if seen.info is not None and seen.train is not None and seen.train.ranks is not None:
            yield from _of_stages(seen.info, seen.train.ranks)
        # A layer that routed nothing in the interval has no ratios, and its experts are not dead.
        layers = [layer for layer in seen.train.layers if any(layer.tokens_per_expert)] if seen.train else []
        if layers:
            yield from _of_layers(layers, seen.dead or {})
            yield _of_fallbacks(layers, seen.fallbacks or {})
            if self._per_expert != "layer":
                yield from _of_experts(layers, seen.tokens or {}, self._per_expert)


def _of_the_run(seen: Snapshot) -> Iterator[Metric]:
    if seen.info is not None:
        info = InfoMetricFamily("moe_dist_run", "What is running.")
        names = ("run_id", "output_dir", "device", "world_size", "total_params", "active_params")
        labels = {name: str(getattr(seen.info, name)) for name in names}
        info.add_metric([], {"version": __version__} | labels)
        yield info
    yield _gauge("run_start_timestamp_seconds", "When this start of the run began.", seen.started)
    yield _gauge("run_finished", "1 after the run has ended as planned.", float(seen.finished))
    yield _gauge("logging_interval_steps", "Steps between two updates of these metrics.", seen.logging_steps)
    if seen.save_steps:
        yield _gauge("checkpoint_interval_steps", "Steps between two checkpoints.", seen.save_steps)


def _of_stages(info: RunInfo, ranks: RanksRecord) -> Iterator[Metric]:
    """Time and memory by pipeline stage (stage 0 is all there is without a pipeline), and which layer is where."""
    own = GaugeMetricFamily(
        "moe_dist_stage_own_seconds", "Own seconds of a step, mean over the stage's ranks.", labels=["stage"]
    )
    memory = GaugeMetricFamily(
        "moe_dist_stage_memory_peak_bytes", "Peak memory, the highest of the stage's ranks.", labels=["stage"]
    )
    for stage in sorted(set(info.stage_of_rank)):
        members = [rank for rank, place in enumerate(info.stage_of_rank) if place == stage]
        own.add_metric([str(stage)], sum(ranks.own_seconds[rank] for rank in members) / len(members))
        memory.add_metric([str(stage)], max(ranks.memory_bytes[rank] for rank in members))
    layers = InfoMetricFamily("moe_dist_layer", "Pipeline stage of each layer.", labels=["layer"])
    for layer, stage in enumerate(info.stage_of_layer):
        layers.add_metric([str(layer)], {"stage": str(stage)})
    yield from (own, memory, layers)


def _of_layers(layers: list[LayerRecord], dead: Mapping[int, int]) -> Iterator[Metric]:
    for field, name, text in LAYER_GAUGES:
        family = GaugeMetricFamily(f"moe_dist_{name}", text, labels=["layer"])
        for layer in layers:
            family.add_metric([str(layer.layer)], getattr(layer, field))
        yield family
    used = GaugeMetricFamily("moe_dist_used_experts_ratio", "exp(entropy of loads) / E; 1: balanced.", labels=["layer"])
    for layer in layers:
        used.add_metric([str(layer.layer)], used_share(layer))
    yield used
    for name, text, limit in (
        ("used_experts", "used_experts_ratio below which a layer has collapsed, sqrt(K / E).", collapse_limit),
        ("load_imbalance", "load_imbalance_ratio above which a layer is unbalanced.", imbalance_limit),
    ):
        family = GaugeMetricFamily(f"moe_dist_{name}_limit_ratio", text, labels=["layer"])
        for layer in layers:
            family.add_metric([str(layer.layer)], limit(layer))
        yield family
    lasting = GaugeMetricFamily(
        "moe_dist_lasting_dead_experts", "Experts without a token for 3 logging intervals.", labels=["layer"]
    )
    for layer in layers:
        lasting.add_metric([str(layer.layer)], dead[layer.layer])
    yield lasting


def _of_fallbacks(layers: list[LayerRecord], fallbacks: Mapping[int, int]) -> Metric:
    text = "Tokens with router logits that were not finite, since this start of the run."
    family = CounterMetricFamily("moe_dist_fallback_tokens", text, labels=["layer"])
    for layer in layers:
        family.add_metric([str(layer.layer)], fallbacks[layer.layer])
    return family


def _of_experts(
    layers: list[LayerRecord], tokens: Mapping[int, tuple[int, ...]], per_expert: PerExpert
) -> Iterator[Metric]:
    labels = ["layer", "expert"]
    counts = CounterMetricFamily(
        "moe_dist_expert_tokens", "(token, expert) pairs routed since this start of the run.", labels=labels
    )
    loads = GaugeMetricFamily(
        "moe_dist_expert_load_ratio", "Load / the layer's mean load; 1: fair share.", labels=labels
    )
    for layer in layers:
        ratios, name = load_ratios(layer), str(layer.layer)
        for expert in _shown(ratios, per_expert):
            counts.add_metric([name, str(expert)], tokens[layer.layer][expert])
            loads.add_metric([name, str(expert)], ratios[expert])
    yield counts
    yield loads


def _shown(ratios: list[float], per_expert: PerExpert) -> Iterable[int]:
    """The experts with series of their own."""
    if per_expert == "full" or len(ratios) <= 2 * NUM_TOP:
        return range(len(ratios))
    by_load = sorted(range(len(ratios)), key=ratios.__getitem__)
    return sorted(by_load[:NUM_TOP] + by_load[-NUM_TOP:])


def _gauges(table: Iterable[tuple[str, str, str]], record: object) -> Iterator[Metric]:
    for field, name, text in table:
        value = getattr(record, field)
        if value is not None:
            yield _gauge(name, text, value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"moe_dist_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"moe_dist_{name}", text, value=value)
