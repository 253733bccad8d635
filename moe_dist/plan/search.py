"""All layouts that a run file allows on a number of devices, what each costs, and why the others are out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_dist.config import Config, ConfigError, ModelConfig
from moe_dist.config.checks import check_sections
from moe_dist.config.sections.training import check_train
from moe_dist.models.counts import RankCounts, per_rank, split_layers
from moe_dist.parallel.layout import Layout, layers_by_pp_rank
from moe_dist.plan.cluster import Cluster
from moe_dist.plan.imbalance import ASSUMED
from moe_dist.plan.memory import Memory, peak_memory
from moe_dist.plan.timing import StepTime, step_time

SCHEDULES = ("1f1b", "gpipe", "interleaved_1f1b", "zero_bubble", "dualpipe_v")
MOST_STAGES = 64
BATCHES = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "eval_batches",
)
"""Keys of `train` that go with the size of a micro-batch."""


@dataclass(frozen=True)
class Estimate:
    """What a run file costs on a number of devices. Times in seconds, memory in bytes of the most loaded rank."""

    config: Config
    layout: Layout
    memory: Memory
    time: StepTime
    tokens: int
    """Of one optimizer step."""

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.tokens / self.time.total / self.layout.world_size

    def fits(self, cluster: Cluster) -> bool:
        return self.memory.total <= cluster.memory

    @property
    def keys(self) -> dict[str, Any]:
        """What differs between layouts, by the keys of a run file."""
        parallel, train = self.config.parallel, self.config.train
        keys: dict[str, Any] = {"parallel.ep_size": parallel.ep_size, "parallel.pp_size": parallel.pp_size}
        if parallel.pp_size > 1:
            keys["parallel.schedule"] = parallel.schedule
        if parallel.stages is not None:
            keys["parallel.stages"] = parallel.stages
        keys["parallel.zero_stage"] = parallel.zero_stage
        if parallel.shard_size is not None:
            keys["parallel.shard_size"] = parallel.shard_size
        keys["train.gradient_checkpointing"] = train.gradient_checkpointing
        return keys | {f"train.{key}": getattr(train, key) for key in BATCHES if getattr(train, key) is not None}

    @property
    def name(self) -> str:
        """For one line: `pp4-1f1b-ep8-zero1-full-mb2`."""
        parallel, train = self.config.parallel, self.config.train
        words = [f"pp{parallel.pp_size}", parallel.schedule] if parallel.pp_size > 1 else []
        words += [f"x{parallel.stages_per_rank}"] if parallel.schedule == "interleaved_1f1b" and words else []
        words += [f"ep{parallel.ep_size}", f"zero{parallel.zero_stage}"]
        words += [f"shard{parallel.shard_size}"] if parallel.shard_size else []
        words += [train.gradient_checkpointing] if train.gradient_checkpointing != "none" else []
        return "-".join([*words, f"mb{train.per_device_train_batch_size}"])


@dataclass
class Plan:
    """`ranked`: what fits, the fastest first. `rejected`: reason -> how many layouts; `nearest`: of those that do not
    fit the one that needs least memory."""

    ranked: list[Estimate]
    rejected: Counter[str] = field(default_factory=Counter)
    nearest: Estimate | None = None
    tried: int = 0

    @property
    def best(self) -> Estimate | None:
        return self.ranked[0] if self.ranked else None


def estimate(config: Config, world_size: int, cluster: Cluster, imbalance: float = ASSUMED) -> Estimate:
    """Of a run file as it is. Raises ConfigError where its layout is impossible."""
    layout = Layout.of(config, world_size)
    counts = per_rank(config.model, layout, layers_by_pp_rank(config))
    return _estimate(config, layout, counts, cluster, imbalance)


def _estimate(
    config: Config, layout: Layout, counts: Sequence[RankCounts], cluster: Cluster, imbalance: float
) -> Estimate:
    return Estimate(
        config,
        layout,
        peak_memory(config, layout, counts, imbalance, cluster.device),
        step_time(config, layout, counts, cluster, imbalance),
        config.global_batch_size(layout.world_size) * config.data.max_seq_length,
    )


def plan(
    config: Config,
    world_size: int,
    cluster: Cluster,
    *,
    global_batch: int | None = None,
    imbalance: float = ASSUMED,
    keep: int | None = None,
) -> Plan:
    """Every legal layout with the same sequences in a step, ranked by tokens per second. `keep`: at most so many."""
    sequences = global_batch or default_batch(config, world_size)
    found = Plan([])
    for asked, counts in _shapes(config, world_size, sequences, found):
        _try_passes(asked, world_size, sequences, counts, cluster, imbalance, found)
    found.ranked.sort(key=lambda one: (-one.tokens_per_second, one.memory.total))
    if keep is not None:
        found.ranked = found.ranked[:keep]
    return found


def least_devices(config: Config, cluster: Cluster, most: int) -> int | None:
    """The smallest power of two, at most `most`, on which any layout fits with one sequence in a micro-batch."""
    size = 1
    while size <= most:
        # A batch that every division divides: whether something fits does not hang on how long a step is.
        if plan(config, size, cluster, global_batch=size * 16, keep=1).best is not None:
            return size
        size *= 2
    return None


def default_batch(config: Config, world_size: int) -> int:
    """Sequences of a step that the run file has on this many devices; raises ConfigError where there are none."""
    batch = config.global_batch_size(max(world_size, config.parallel.pp_size))
    return max(batch, 1)


def _shapes(config: Config, world_size: int, sequences: int, found: Plan) -> Iterator[tuple[Config, list[RankCounts]]]:
    """Divisions of the model over ranks, each with the parameters of its pipeline ranks."""
    model = config.model
    layers_of: dict[tuple[int, str, int], list[list[range]]] = {}
    stages_of: dict[int, list[int]] = {}
    for pp_size in _divisors(world_size, min(MOST_STAGES, model.num_hidden_layers)):
        dp_size = world_size // pp_size
        if sequences % dp_size:
            found.rejected[
                f"pp_size={pp_size}: {sequences:,} sequences of a step are no multiple of {dp_size:,} replicas"
            ] += 1
            continue
        for ep_size in _divisors(dp_size, max(1, model.num_experts if model.moe_layers else 1)):
            if model.moe_layers and model.num_experts % ep_size:
                found.rejected[f"ep_size={ep_size}: does not divide {model.num_experts} experts"] += 1
                continue
            for schedule, per_rank_stages in _schedules(pp_size, model):
                key = (pp_size, schedule, per_rank_stages)
                counts = None
                for zero_stage, shard_size in _shardings(config, dp_size, ep_size, pp_size):
                    update: dict[str, Any] = {
                        "pp_size": pp_size,
                        "ep_size": ep_size,
                        "schedule": schedule,
                        "zero_stage": zero_stage,
                        "shard_size": shard_size,
                        "stages": None,
                        "engine": "torch",
                        "cpu_offload": False,
                    }
                    if pp_size > 1 and pp_size * per_rank_stages not in stages_of:
                        split = split_layers(model, pp_size * per_rank_stages)
                        stages_of[pp_size * per_rank_stages] = [len(layers) for layers in split]
                    if pp_size > 1:
                        update["stages"] = stages_of[pp_size * per_rank_stages]
                    asked = _with(config, update)
                    if key not in layers_of:
                        layers_of[key] = layers_by_pp_rank(asked)
                    counts = counts or per_rank(model, Layout(world_size, pp_size, ep_size), layers_of[key])
                    if per_rank_stages <= 2:
                        asked = _with(asked, {"stages": None})
                    yield asked, counts


def _try_passes(
    asked: Config,
    world_size: int,
    sequences: int,
    counts: Sequence[RankCounts],
    cluster: Cluster,
    imbalance: float,
    found: Plan,
) -> None:
    """Micro-batches and recomputation of one division.

    What recomputes more is slower, and only tried where less does not fit; a larger micro-batch needs more memory, and
    is only tried where the smaller one fits.
    """
    per_replica = sequences * asked.parallel.pp_size // world_size
    for micro_batch in _divisors(per_replica, 16):
        fitting = False
        for recompute in ("none", "selective", "full"):
            train = asked.train.model_copy(
                update={
                    **asked.train.micro_batches(micro_batch, per_replica // micro_batch),
                    "gradient_checkpointing": recompute,
                }
            )
            one = asked.model_copy(update={"train": train})
            found.tried += 1
            try:
                check_train(train)
                check_sections(one)
                layout = Layout.of(one, world_size)
            except (ConfigError, ValueError) as error:
                found.rejected[_shortened(str(error))] += 1
                break
            estimated = _estimate(one, layout, counts, cluster, imbalance)
            if estimated.fits(cluster):
                found.ranked.append(estimated)
                fitting = True
                break
            found.rejected["memory: needs more than a device has"] += 1
            if found.nearest is None or estimated.memory.total < found.nearest.memory.total:
                found.nearest = estimated
        if not fitting:
            return


def _with(config: Config, parallel: dict[str, Any]) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def _schedules(pp_size: int, model: ModelConfig) -> Iterator[tuple[str, int]]:
    """Schedules, and stages on each rank."""
    if pp_size == 1:
        yield "1f1b", 1
        return
    for schedule in SCHEDULES:
        if schedule in ("1f1b", "gpipe"):
            yield schedule, 1
        elif 2 * pp_size <= model.num_hidden_layers:
            yield schedule, 2
            for several in (4, 8, 12, 16, 24):
                if schedule == "interleaved_1f1b" and several * pp_size <= model.num_hidden_layers:
                    yield schedule, several


def _shardings(config: Config, dp_size: int, ep_size: int, pp_size: int) -> Iterator[tuple[int, int | None]]:
    """zero_stage and shard_size."""
    yield 0, None
    if dp_size == 1 or config.optimizer.optim == "adafactor":
        return
    for zero_stage in (1, 3) if pp_size > 1 else (1, 2, 3):
        yield zero_stage, None
        if pp_size == 1:
            for size in (8, 64):
                if ep_size < size < dp_size and dp_size % size == 0 and size % ep_size == 0:
                    yield zero_stage, size


def _shortened(reason: str) -> str:
    """Without the numbers of one micro-batch, so that like reasons are counted together."""
    return reason.split(": ", 1)[-1] if reason.startswith("train.gradient_accumulation_steps") else reason
