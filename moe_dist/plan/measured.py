"""What a run has measured beside what a plan says of it, and what a plan learns from the difference. No torch."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_dist.config import Config, ConfigError, load_mapping, parse_yaml
from moe_dist.monitor.run_log import Row, RunLog
from moe_dist.plan.cluster import Cluster
from moe_dist.plan.links import group_of
from moe_dist.plan.machine import cluster_of_device
from moe_dist.plan.search import Estimate, estimate
from moe_dist.plan.words import duration
from moe_dist.train.run_summary import byte_size

TITLES = ["", "planned", "measured", "plan against run"]


@dataclass(frozen=True)
class Compared:
    """One number of a run. Seconds are of one optimizer step."""

    name: str
    planned: float
    measured: float
    text: Callable[[float], str]

    @property
    def row(self) -> list[str]:
        """As TITLES name it."""
        error = f"{self.planned / self.measured - 1:+.0%}" if self.measured else "-"
        return [self.name, self.text(self.planned), self.text(self.measured), error]


@dataclass(frozen=True)
class MeasuredRun:
    """The last start of a run: what it was, medians of its logged intervals, and what a plan says of the same."""

    cluster: Cluster
    estimate: Estimate
    step: float
    computing: float
    """Seconds of a step in which the busiest rank waits for no other, without those for data."""
    dispatch: float | None
    """Seconds of a step on the network, of the rank that waits least; None without expert parallelism."""
    gradients: float | None
    """Seconds of reducing gradients, of the rank that waits least; None where they travel while others are computed."""
    memory: float | None
    """Bytes at the peak, above those that were there before the model; None where nobody knows how many those were."""
    imbalance: float
    """Rows of the busiest expert as multiples of the mean, mean over layers."""
    storage: float | None
    """Bytes per second of checkpoints, of one host."""


def measured_run(run: RunLog, cluster: Cluster | None = None) -> MeasuredRun:
    """Of the last start of a run. `cluster`: of what it ran on; by default as `launch.cluster` and its log say.

    Raises ConfigError where the log does not say enough.
    """
    if not run.starts:
        raise ConfigError(f"{run.folder}: its log does not say what has run")
    start = run.starts[-1]
    config = _config_of(run, start)
    per_host = max(Counter(start.get("hosts") or ["here"] * start["world_size"]).values())
    if cluster is None:
        cluster = cluster_of_device(config, start.get("device_name") or start["device"], per_host)
    cluster = cluster.model_copy(update={"devices_per_host": per_host})
    # The first interval of a start has what is done once: kernels are chosen, memory is taken.
    first = start.get("step") or 0
    rows = [row for row in run.train if row["step"] > first] or run.train[-1:]
    layout = estimate(config, start["world_size"], cluster)
    computing = [spent for row in rows if (spent := _busiest(row)) is not None]
    if not computing:
        raise ConfigError(f"{run.folder}: no step with times of ranks has been logged")
    with_layers = [row for row in rows if row["layers"]]
    loads = [statistics.fmean(layer["load_imbalance"] for layer in row["layers"]) for row in with_layers]
    written = [row["bytes"] / row["seconds"] for row in run.checkpoints if row["ok"] and row["seconds"] > 0]
    hosts = -(-start["world_size"] // per_host)
    alone = layout.config.parallel.zero_stage == 0 and layout.layout.pp_size == 1 and layout.layout.dp_size > 1
    return MeasuredRun(
        cluster,
        layout,
        step=statistics.median(row["step_seconds"] for row in rows),
        computing=statistics.median(computing),
        dispatch=statistics.median(row["all_to_all_share"] * row["step_seconds"] for row in rows)
        if layout.layout.ep_size > 1
        else None,
        gradients=statistics.median(_least(row, "gradients") for row in rows if row.get("ranks")) if alone else None,
        memory=_peak(rows, start),
        imbalance=statistics.median(loads) if loads else 1.0,
        storage=statistics.median(written) / hosts if written else None,
    )


def comparison(run: MeasuredRun) -> list[Compared]:
    """Predicted against measured, as the plan would have said it before the run."""
    planned, time = run.estimate, run.estimate.time
    world = planned.layout.world_size
    found = []
    if run.memory is not None:
        memory = planned.memory.total
        found.append(Compared("peak memory of a rank", memory, run.memory, lambda size: byte_size(int(size))))
    found += [
        Compared("step", time.total, run.step, duration),
        Compared(
            "tokens per second, of a device",
            planned.tokens / time.total / world,
            planned.tokens / run.step / world,
            _count,
        ),
        Compared("computing, in a step", time.compute + time.imbalance + time.update, run.computing, duration),
    ]
    if run.dispatch is not None:
        found.append(Compared("all-to-all, in a step", time.dispatch, run.dispatch, duration))
    if run.gradients is not None:
        found.append(Compared("gradients between replicas, in a step", time.sharding, run.gradients, duration))
    return found


def learned(run: MeasuredRun) -> dict[str, Any]:
    """Keys of a cluster file with which a plan computes as fast, and sends as fast, as the run has."""
    cluster, time, layout = run.cluster, run.estimate.time, run.estimate.layout
    faster = (time.compute + time.imbalance + time.update) / run.computing
    shares = ("gemm_efficiency", "grouped_efficiency", "attention_efficiency")
    # Shares of a peak end at 1: what is more is a higher peak.
    over = max(1.0, *(getattr(cluster, key) * faster for key in shares))
    keys: dict[str, Any] = {key: getattr(cluster, key) * faster / over for key in shares}
    keys |= {key: getattr(cluster, key) * over for key in ("peak_bf16", "peak_float32")}
    keys["memory_bandwidth"] = cluster.memory_bandwidth * faster
    keys["layer_overhead"] = cluster.layer_overhead / faster
    seen = (("ep", time.dispatch, run.dispatch), ("dp", time.sharding, run.gradients))
    for axis, planned, spent in seen:
        if not spent or not planned:
            continue
        link = "network" if group_of(layout, axis, cluster.devices_per_host).crosses else "link"
        if f"{link}_bandwidth" not in keys:  # by the all-to-all, where there is one
            keys[f"{link}_bandwidth"] = getattr(cluster, f"{link}_bandwidth") * planned / spent
            keys[f"{link}_latency"] = getattr(cluster, f"{link}_latency") * spent / planned
    if run.storage is not None:
        keys["storage_bandwidth"] = run.storage
    return keys


def _config_of(run: RunLog, start: Row) -> Config:
    try:
        return load_mapping(parse_yaml(start["config_text"]), notice=lambda text: None)
    except (ConfigError, ValueError, TypeError) as error:
        raise ConfigError(f"{run.folder}: its configuration cannot be read back: {error}") from None


def _busiest(row: Row) -> float | None:
    """Seconds of computing and of the optimizer on the rank that has most of them."""
    phases = (row.get("ranks") or {}).get("phase_seconds") or {}
    if not {"computing", "optimizer"} <= phases.keys():  # of an earlier version
        return None
    return max(sum(seconds) for seconds in zip(phases["computing"], phases["optimizer"], strict=True))


def _least(row: Row, phase: str) -> float:
    seconds: list[float] = row["ranks"]["phase_seconds"][phase]
    return min(seconds)


def _peak(rows: list[Row], start: Row) -> float | None:
    before = start.get("memory_before") or 0
    if start["device"] == "cpu" and not before:  # Python and libraries are most of it
        return None
    peaks = [(row.get("ranks") or {}).get("memory_bytes") or [row["memory_bytes"]] for row in rows]
    return max(map(max, peaks)) - before


def _count(number: float) -> str:
    return f"{number:,.0f}"
