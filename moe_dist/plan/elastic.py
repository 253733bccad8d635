"""The layout that a run takes on so many ranks, where the run file leaves that open. No torch.

With `parallel.layout=auto` it is the one that a plan ranks first. With `parallel.elastic` the pipeline and the experts
stay as they are configured when the ranks allow it, otherwise they are spread over fewer. What must stay in both is the
global batch; what may change is how it is shared out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from moe_dist.checkpoint.config_diff import micro_batch_change
from moe_dist.checkpoint.lock import Job, begun
from moe_dist.checkpoint.reading import CheckpointRef, locate, read_trainer_state
from moe_dist.checkpoint.storage import open_storage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.config import Config, ConfigError
from moe_dist.parallel.layout import Layout
from moe_dist.plan.cluster import Cluster
from moe_dist.plan.machine import machine_of
from moe_dist.plan.search import BATCHES, Estimate, Plan, estimate, plan
from moe_dist.train.run_summary import byte_size

CHOSEN = {
    "parallel": ("planned_ranks", "ep_size", "pp_size", "schedule", "stages", "zero_stage", "shard_size"),
    "train": ("gradient_checkpointing", *BATCHES),
}
"""Keys that `parallel.layout=auto` chooses, by section."""


@dataclass(frozen=True)
class SavedRun:
    """What the checkpoint that a start goes on from says of the run that wrote it."""

    name: str
    world_size: int
    batch: int
    """Sequences in a step."""
    config: dict[str, Any]


def replan(
    config: Config, world_size: int, batch: int | None = None, job: Job | None = None, per_host: int | None = None
) -> tuple[Config, str | None]:
    """`config` for this many ranks, and a sentence about what was chosen or changed (None: nothing).

    `batch`: sequences in a step before there is a checkpoint that says so; by default what the configuration gives on
    these ranks. `job`: the start that asks. `per_host`: ranks on each host; default: all on one. With neither
    `parallel.layout=auto` nor `parallel.elastic` nothing is ever changed. Raises ConfigError when no layout of these
    ranks keeps the global batch, with the numbers of ranks that do, and when none fits.
    """
    parallel = config.parallel
    if parallel.layout == "auto":
        if parallel.planned_ranks == world_size:
            return config, None
        return _chosen(config, world_size, batch, saved_run(config, job), per_host or world_size)
    if not parallel.elastic:
        return config, None
    batch = saved_batch(config, job) or batch or first_batch(config, world_size)
    plans = _plans(config, world_size, batch)
    nearest = next(plans, None)
    if nearest is None:
        raise no_layout(config, world_size, batch)
    if nearest == config:
        return config, None
    found = _best_of(config, [nearest, *plans], world_size, per_host or world_size)
    parallel, layout = found.parallel, Layout.of(found, world_size)
    train = found.train
    return found, (
        f"{world_size} ranks: pp {parallel.pp_size} x edp {layout.edp_size} x ep {parallel.ep_size}, "
        f"{train.gradient_accumulation_steps} micro-batches of {train.per_device_train_batch_size} on each replica "
        f"keep the global batch of {batch} sequences"
    )


def chosen_keys(config: Config) -> list[str]:
    """What `parallel.layout=auto` has chosen, as words after a run file."""
    tree = config.model_dump(mode="json")
    words = {f"{section}.{key}": tree[section][key] for section, keys in CHOSEN.items() for key in keys}
    for key in BATCHES:
        if tree["train"][key] is None:  # what is evaluated was not chosen
            del words[f"train.{key}"]
    return [f"{key}={'null' if value is None else str(value).replace(' ', '')}" for key, value in words.items()]


def _chosen(
    config: Config, world_size: int, batch: int | None, saved: SavedRun | None, per_host: int
) -> tuple[Config, str]:
    """The layout of the checkpoint on as many ranks as it was chosen for, or else the plan's best."""
    sequences = batch or first_batch(config, world_size)
    if saved is not None and (config.parallel.elastic or saved.world_size != world_size):
        sequences = saved.batch
    where = f"parallel.layout=auto on {world_size} rank{'s'[: world_size > 1]}"
    if saved is not None and sequences == saved.batch:
        kept = _as_saved(config, saved, world_size)
        if kept is not None:
            return kept, f"{where}: {', '.join(chosen_keys(kept))}, as in {saved.name}"
    if not fitting(config, [world_size], sequences):
        raise no_layout(config, world_size, sequences)
    machine = machine_of(config, per_host)
    if machine is None:
        raise ConfigError(
            "parallel.layout=auto: the devices here are not known; say which they are (launch.cluster=h100, or a file: "
            "docs/planning.md), or take parallel.layout=given"
        )
    found = plan(config, world_size, machine, global_batch=sequences)
    one = _nearest_in_kind(config, saved, found)
    if one is None:
        raise ConfigError(_nothing_fits(where, found, machine))
    tree = one.config.model_dump()
    count = one.config.train.gradient_accumulation_steps
    tree["parallel"]["planned_ranks"] = world_size
    return Config.model_validate(tree), (
        f"{where} of {machine.name}: {one.name}, {count} micro-batch{'es'[: 2 * (count > 1)]} a step; planned: "
        f"{one.tokens_per_second:,.0f} tokens/s per device, {byte_size(int(one.memory.total))} of "
        f"{byte_size(int(machine.memory))}"
    )


def _as_saved(config: Config, saved: SavedRun, world_size: int) -> Config | None:
    """With the keys that were chosen for as many ranks before; None where they were not, or where they fit no more."""
    if saved.config.get("parallel", {}).get("planned_ranks") != world_size:
        return None
    tree = config.model_dump()
    before = saved.config["train"]
    tree["parallel"] |= {key: saved.config["parallel"][key] for key in CHOSEN["parallel"]}
    tree["train"] |= {"gradient_checkpointing": before["gradient_checkpointing"]}
    tree["train"] |= config.train.micro_batches(
        before["per_device_train_batch_size"], before["gradient_accumulation_steps"]
    )
    try:
        found = Config.model_validate(tree)
        Layout.of(found, world_size)
    except (ValidationError, ConfigError):
        return None
    return found


def _nearest_in_kind(config: Config, saved: SavedRun | None, found: Plan) -> Estimate | None:
    """The fastest; where a micro-batch of another size trains otherwise, of those with the size so far if there are."""
    if saved is None:
        return found.best
    tree = config.model_dump(mode="json")
    for one in found.ranked:
        tree["train"]["per_device_train_batch_size"] = one.config.train.per_device_train_batch_size
        if micro_batch_change(saved.config, tree) is None:
            return one
    return found.best


def _nothing_fits(where: str, found: Plan, machine: Cluster) -> str:
    near = found.nearest
    if near is None:
        reason = found.rejected.most_common(1)
        return f"{where}: no layout is possible: {reason[0][0] if reason else 'nothing was tried'}"
    return (
        f"{where}: no layout fits {machine.name}, where a run may take {byte_size(int(machine.memory))}; the nearest, "
        f"{near.name}, needs {byte_size(int(near.memory.total))}: take more ranks, or larger devices"
    )


def no_layout(config: Config, world_size: int, batch: int) -> ConfigError:
    """The error that says which numbers of ranks keep the global batch instead."""
    fit = [str(world) for world in fitting(config, range(1, 4 * world_size + 65), batch)]
    return ConfigError(
        f"world_size={world_size}: no layout keeps the global batch of {batch} sequences; "
        f"numbers of ranks that do: {', '.join(fit[:12]) or 'none'}"
    )


def _best_of(config: Config, plans: list[Config], world_size: int, per_host: int) -> Config:
    """Of layouts that keep the batch, the nearest first: the nearest that keeps pipeline and experts and fits, else the
    fastest that fits, else, and where the devices are not known, the nearest."""
    machine = None if config.parallel.cpu_offload else machine_of(config, per_host)
    if machine is None:
        return plans[0]
    shape = (config.parallel.pp_size, config.parallel.ep_size)
    others = []
    for found in plans:
        one = estimate(found, world_size, machine)
        if one.fits(machine):
            if (found.parallel.pp_size, found.parallel.ep_size) == shape:
                return found
            others.append(one)
    return max(others, key=lambda one: one.tokens_per_second).config if others else plans[0]


def global_batch(config: Config, world_size: int) -> int:
    """Sequences in one step, to be kept: those of the newest checkpoint, or of a first start on this many ranks."""
    return saved_batch(config) or first_batch(config, world_size)


def fitting(config: Config, worlds: Iterable[int], batch: int) -> list[int]:
    """Those of `worlds`, numbers of ranks, that some layout trains on with this global batch."""
    if config.parallel.layout == "auto":
        deepest = config.model.num_hidden_layers
        return [
            world
            for world in worlds
            if any(world % pp_size == 0 and batch % (world // pp_size) == 0 for pp_size in range(1, deepest + 1))
        ]
    return [world for world in worlds if next(_plans(config, world, batch), None)]


def saved_batch(config: Config, job: Job | None = None) -> int | None:
    """Sequences in one step of the checkpoint that this start of `job` goes on from; None without one."""
    saved = saved_run(config, job)
    return None if saved is None else saved.batch


def saved_run(config: Config, job: Job | None = None) -> SavedRun | None:
    """What the checkpoint says that this start of `job` goes on from; None without one."""
    checkpoint = config.checkpoint
    if checkpoint.resume == "never":  # but for the first start of a job
        noted = begun(config.train.output_dir)
        if not any(name in one for name in (job.earlier if job is not None else ()) for one in noted):
            return None
    try:
        storage = open_storage(checkpoint.folder or config.train.output_dir)
        keys = Keys(checkpoint.encryption_keys)
        found = [CheckpointRef(storage, step) for step in reversed(storage.steps())]
        if checkpoint.resume not in ("auto", "never"):
            found.insert(0, locate(checkpoint.resume, storage))
        for one in found:
            try:
                manifest = one.storage.manifest(one.step)
                tree = read_trainer_state(one, manifest, keys)["config"]
                replicas = manifest.layout["edp"] * manifest.layout["ep"]
                size = tree["train"]["per_device_train_batch_size"] * tree["train"]["gradient_accumulation_steps"]
            except (CheckpointError, OSError, KeyError):
                continue  # whoever resumes says what is wrong with it
            return SavedRun(f"checkpoint-{one.step}", manifest.layout["world"], replicas * size, tree)
    except (CheckpointError, OSError):
        pass
    return None


def first_batch(config: Config, world_size: int) -> int:
    """Before the first checkpoint: what the configuration says, on these ranks or the fewest it is made for."""
    if config.parallel.layout == "auto":  # which ep_size the file has does not matter
        ranks = config.parallel.planned_ranks or world_size
        return max(1, config.global_batch_size(max(ranks, config.parallel.pp_size)))
    try:
        replicas = Layout.of(config, world_size).dp_size
    except ConfigError:
        replicas = config.parallel.ep_size
    return replicas * config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps


def _plans(config: Config, world_size: int, batch: int) -> Iterator[Config]:
    """Configurations that do, the nearest to the configured one first."""
    parallel, micro = config.parallel, config.train.per_device_train_batch_size
    for pp_size in _down(parallel.pp_size):
        if world_size % pp_size:
            continue
        dp_size = world_size // pp_size
        for ep_size in _down(parallel.ep_size):
            if dp_size % ep_size or (ep_size > 1 and config.model.num_experts % ep_size) or batch % dp_size:
                continue
            for size in _down(min(micro, batch // dp_size)):
                if batch // dp_size % size:
                    continue
                tree = config.model_dump()
                tree["parallel"] |= {"pp_size": pp_size, "ep_size": ep_size}
                if pp_size != parallel.pp_size:
                    tree["parallel"] |= {"stages": None}
                tree["train"] |= config.train.micro_batches(size, batch // dp_size // size)
                try:
                    found = Config.model_validate(tree)
                    Layout.of(found, world_size)
                except (ValidationError, ConfigError):
                    continue
                yield found


def _down(number: int) -> range:
    return range(number, 0, -1)
