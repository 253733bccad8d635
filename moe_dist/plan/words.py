"""A plan in words, and as plain data for programs."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass
from typing import Any

from moe_dist.config import Config
from moe_dist.models.counts import flops_per_token, parameter_counts
from moe_dist.parallel.state_bytes import moments
from moe_dist.plan.activations import Widths
from moe_dist.plan.cluster import Cluster
from moe_dist.plan.failures import Reliability
from moe_dist.plan.search import Estimate, Plan
from moe_dist.train.run_summary import amount, byte_size

MEMORY_WORDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "gathered": "gathered from shards",
    "activations": "activations",
    "logits": "head and loss",
    "working": "one block at work",
    "dispatch": "rows on the way",
}
TIME_WORDS = {
    "compute": "computing",
    "imbalance": "uneven experts",
    "dispatch": "all-to-all",
    "bubble": "pipeline bubble",
    "pipeline": "between stages",
    "sharding": "gradients and shards",
    "update": "optimizer",
}
SNAPSHOT_BANDWIDTH = 20e9
"""Bytes per second from a device to its host's memory: what a checkpoint written in the background stops for."""


@dataclass(frozen=True)
class Bill:
    """What training on so many tokens takes. Seconds, Wh, money."""

    tokens: int
    seconds: float
    """With failures, checkpoints and restarts."""
    goodput: float
    interval: float
    """Between checkpoints."""
    energy: float
    cost: float | None


def reliability(one: Estimate, cluster: Cluster) -> Reliability:
    """Of this layout on this cluster."""
    state = one.memory.weights + one.memory.optimizer
    return Reliability(
        mtbf=cluster.mtbf_hours * 3600 / one.layout.world_size,
        save=max(0.5, state / SNAPSHOT_BANDWIDTH),
        restart=cluster.restart_seconds + checkpoint_bytes(one.config) / _storage(one, cluster),
    )


def checkpoint_bytes(config: Config) -> float:
    """Of one checkpoint: weights and optimizer state of the whole model, in full."""
    return 4.0 * parameter_counts(config.model).total * (1 + moments(config.optimizer))


def _storage(one: Estimate, cluster: Cluster) -> float:
    return cluster.storage_bandwidth * math.ceil(one.layout.world_size / cluster.devices_per_host)


def bill(one: Estimate, cluster: Cluster, tokens: int) -> Bill:
    """For training on `tokens`."""
    run = reliability(one, cluster)
    # A checkpoint is written while the next steps run: no sooner than the one before it is whole.
    interval = max(run.best_interval, checkpoint_bytes(one.config) / _storage(one, cluster))
    goodput = run.goodput(interval)
    seconds = tokens / (one.tokens_per_second * one.layout.world_size) / goodput
    hours = seconds / 3600 * one.layout.world_size
    cost = None if cluster.price_per_hour is None else hours * cluster.price_per_hour
    return Bill(tokens, seconds, goodput, interval, hours * cluster.watts, cost)


def utilisation(one: Estimate, cluster: Cluster) -> float:
    """Model FLOP utilisation as a run logs it, 0..1."""
    peak = cluster.peak_bf16 if Widths.of(one.config).w == 2 else cluster.peak_float32
    return flops_per_token(one.config.model, one.config.data.max_seq_length) * one.tokens_per_second / peak


def parallel_block(one: Estimate) -> str:
    """For the run file."""
    lines: list[str] = []
    section = ""
    for key, value in sorted(one.keys.items(), key=lambda item: item[0].partition(".")[0]):
        name, _, rest = key.partition(".")
        lines += [f"{name}:"] if name != section else []
        section = name
        lines.append(f"  {rest}: {value}")
    return "\n".join(lines)


def launch_line(path: str, one: Estimate, cluster: Cluster) -> str:
    """The command that starts it: on one host by itself, on several the same line on each."""
    world, per_host = one.layout.world_size, cluster.devices_per_host
    keys = " ".join(f"{key}={str(value).replace(' ', '')}" for key, value in one.keys.items())
    if world <= per_host:
        return f"moe-dist train {shlex.quote(path)} launch.nproc_per_node={world} {keys}"
    return (
        f"moe-dist launch torchrun {shlex.quote(path)} --nnodes {math.ceil(world / per_host)} "
        f"--nproc-per-node {per_host} "
        f"--rdzv-endpoint HOST:29400 {keys}"
    )


def floor(one: Estimate, cluster: Cluster, least: int | None = None) -> list[tuple[str, str]]:
    """Hardware of this layout: devices, host memory, disk. `least`: devices on which anything fits."""
    hosts = math.ceil(one.layout.world_size / cluster.devices_per_host)
    here = min(one.layout.world_size, cluster.devices_per_host)
    state = one.memory.weights + one.memory.optimizer
    # A snapshot of the state for the checkpoint in the background, beside 8 GB for each process and 16 for the system.
    host = here * (state + 8e9) + 16e9
    disk = 3 * checkpoint_bytes(one.config)
    return [
        (
            "devices",
            f"{one.layout.world_size} x {cluster.name} of {cluster.memory_gb:g} GB on {hosts} host{'s'[: hosts > 1]}",
        ),
        *([] if least is None else [("devices at least", f"{least} x {cluster.name}")]),
        ("memory of a host", f"{byte_size(int(host))} at least, {byte_size(int(2 * host))} recommended"),
        (
            "disk for checkpoints",
            f"{byte_size(int(disk))} (three of them), written at {_storage(one, cluster) / 1e9:.3g} GB/s",
        ),
    ]


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 72 * 3600 else f"{seconds / 86400:.3g} days"


def terminal_lines(
    path: str, found: Plan, cluster: Cluster, tokens: int, least: int | None = None, count: int = 8
) -> list[str]:
    """What `moe-dist plan` prints of a search."""
    lines: list[str] = []
    best = found.best
    if best is None:
        lines.append(f"No layout fits: {found.tried} were tried.")
        if found.nearest is not None:
            near = found.nearest
            lines.append(
                f"The nearest is {near.name}, which needs {byte_size(int(near.memory.total))} on a device that has "
                f"{byte_size(int(cluster.memory))}: take more devices (--gpus), or larger ones (--gpu)."
            )
        return [*lines, *rejections(found)]
    lines += [
        f"{len(found.ranked)} of {found.tried} layouts fit; the fastest:",
        "",
        f"  {'layout':<44}{'tokens/s per device':>20}{'step':>10}{'memory':>10}{'MFU':>7}  most time beside computing",
    ]
    for one in found.ranked[:count]:
        times = {key: value for key, value in asdict(one.time).items() if key != "compute"}
        worst = max(times, key=lambda key: times[key])
        lines.append(
            f"  {one.name:<44}{one.tokens_per_second:>20,.0f}{duration(one.time.total):>10}"
            f"{byte_size(int(one.memory.total)):>10}{utilisation(one, cluster):>7.0%}  "
            f"{TIME_WORDS[worst]}, {times[worst] / one.time.total:.0%}"
        )
    if len(found.ranked) > 1:
        last = found.ranked[-1]
        share = last.tokens_per_second / best.tokens_per_second
        lines.append(f"  the slowest that fits, {last.name}, reaches {share:.0%} of the fastest")
    lines += ["", *rejections(found), "", "Memory of the most loaded rank:"]
    lines += [
        f"  {MEMORY_WORDS[key]:<24}{byte_size(int(value)):>10}"
        for key, value in asdict(best.memory).items()
        if value >= 0.5
    ]
    lines.append(f"  {'all, of ' + byte_size(int(cluster.memory)):<24}{byte_size(int(best.memory.total)):>10}")
    lines += ["", "Time of a step:"]
    lines += [
        f"  {TIME_WORDS[key]:<24}{duration(value):>10}{value / best.time.total:>6.0%}"
        for key, value in asdict(best.time).items()
        if value > 0
    ]
    made = bill(best, cluster, tokens)
    cost = "" if made.cost is None else f", {made.cost:,.0f} at {cluster.price_per_hour:g} per device and hour"
    lines += [
        "",
        f"{amount(tokens)} tokens take {duration(made.seconds)} on {best.layout.world_size} devices: "
        f"{made.seconds / 3600 * best.layout.world_size:,.0f} device hours, {made.energy / 1e6:,.3g} MWh{cost}.",
        f"A checkpoint every {duration(made.interval)} leaves {made.goodput:.1%} of the time for progress "
        f"(a failure every {duration(reliability(best, cluster).mtbf)}).",
        "",
        *(f"{name + ':':<24}{value}" for name, value in floor(best, cluster, least)),
        "",
        "In the run file:",
        *(f"  {line}" for line in parallel_block(best).splitlines()),
        "",
        "Start it:",
        f"  {launch_line(path, best, cluster)}",
    ]
    return lines


def rejections(found: Plan, count: int = 6) -> list[str]:
    """Why the others are out, the most frequent first."""
    if not found.rejected:
        return []
    return ["Left out:", *(f"  {number:>5}  {reason}" for reason, number in found.rejected.most_common(count))]


def facts(one: Estimate, cluster: Cluster, tokens: int) -> dict[str, Any]:
    """One layout for programs: bytes, seconds, tokens per second of one device."""
    return {
        "layout": one.name,
        "keys": one.keys,
        "tokens_per_second_per_device": one.tokens_per_second,
        "mfu": utilisation(one, cluster),
        "memory": {**asdict(one.memory), "total": one.memory.total},
        "step_seconds": {**asdict(one.time), "total": one.time.total},
        "bill": asdict(bill(one, cluster, tokens)),
    }


def plan_facts(
    path: str, found: Plan, cluster: Cluster, tokens: int, least: int | None = None, count: int = 20
) -> dict[str, Any]:
    """The whole plan for programs."""
    return {
        "cluster": cluster.model_dump(),
        "tried": found.tried,
        "fitting": len(found.ranked),
        "rejected": dict(found.rejected.most_common()),
        "nearest": None if found.nearest is None else facts(found.nearest, cluster, tokens),
        "ranked": [facts(one, cluster, tokens) for one in found.ranked[:count]],
        "launch": None if found.best is None else launch_line(path, found.best, cluster),
        "hardware": {} if found.best is None else dict(floor(found.best, cluster, least)),
    }
