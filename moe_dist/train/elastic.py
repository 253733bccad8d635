"""Another number of ranks than before, or less room: the layout and the micro-batches that keep the training the same.
No torch.

What must stay is the global batch; what may change is how it is shared out. The pipeline and the experts stay as they
are configured when the ranks allow it, otherwise they are spread over fewer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import ValidationError

from moe_dist.checkpoint.lock import Job, begun
from moe_dist.checkpoint.reading import CheckpointRef, locate, read_trainer_state
from moe_dist.checkpoint.storage import open_storage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.config import Config, ConfigError
from moe_dist.parallel.layout import Layout


def replan(
    config: Config, world_size: int, batch: int | None = None, job: Job | None = None
) -> tuple[Config, str | None]:
    """`config` for this many ranks, and a sentence about what was changed (None: nothing).

    `batch`: sequences in a step before there is a checkpoint that says so; by default what the configuration gives on
    these ranks. `job`: the start that asks. Without `parallel.elastic` nothing is ever changed. Raises ConfigError when
    no layout of these ranks keeps the global batch, with the numbers of ranks that do.
    """
    if not config.parallel.elastic:
        return config, None
    batch = saved_batch(config, job) or batch or first_batch(config, world_size)
    for found in _plans(config, world_size, batch):
        if found == config:
            return config, None
        parallel, layout = found.parallel, Layout.of(found, world_size)
        train = found.train
        return found, (
            f"{world_size} ranks: pp {parallel.pp_size} x edp {layout.edp_size} x ep {parallel.ep_size}, "
            f"{train.gradient_accumulation_steps} micro-batches of {train.per_device_train_batch_size} on each replica "
            f"keep the global batch of {batch} sequences"
        )
    fit = [str(world) for world in fitting(config, range(1, 4 * world_size + 65), batch)]
    raise ConfigError(
        f"world_size={world_size}: no layout keeps the global batch of {batch} sequences; "
        f"numbers of ranks that do: {', '.join(fit[:12]) or 'none'}"
    )


def halved(config: Config) -> Config | None:
    """`config` with micro-batches of half the size or less, and as many more; None where none are smaller.

    Ranks take as many sequences a step as before, and as many are evaluated.
    """
    train = config.train
    size = train.per_device_train_batch_size
    counted = train.eval_batches if train.per_device_eval_batch_size is None else None  # in sizes of training
    for smaller in _down(size // 2):
        each, left = divmod(size * train.gradient_accumulation_steps, smaller)
        if left or (counted is not None and counted * size % smaller):
            continue
        tree = config.model_dump()
        tree["train"] |= {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": each}
        if counted is not None:
            tree["train"]["eval_batches"] = counted * size // smaller
        try:
            return Config.model_validate(tree)
        except ValidationError:
            continue  # a schedule, or a file of DeepSpeed's, that wants other numbers
    return None


def batches(config: Config, before: Config) -> str:
    """What has become of the micro-batches, in words."""
    now, then = (
        f"{one.train.gradient_accumulation_steps} x {one.train.per_device_train_batch_size}" for one in (config, before)
    )
    return f"micro-batches of {now} sequences on each replica instead of {then} (train.auto_find_batch_size)"


def global_batch(config: Config, world_size: int) -> int:
    """Sequences in one step, to be kept: those of the newest checkpoint, or of a first start on this many ranks."""
    return saved_batch(config) or first_batch(config, world_size)


def fitting(config: Config, worlds: Iterable[int], batch: int) -> list[int]:
    """Those of `worlds`, numbers of ranks, that some layout trains on with this global batch."""
    return [world for world in worlds if next(_plans(config, world, batch), None)]


def saved_batch(config: Config, job: Job | None = None) -> int | None:
    """Sequences in one step of the checkpoint that this start of `job` goes on from; None without one."""
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
                train = read_trainer_state(one, manifest, keys)["config"]["train"]
            except (CheckpointError, OSError, KeyError):
                continue  # whoever resumes says what is wrong with it
            replicas = manifest.layout["edp"] * manifest.layout["ep"]
            return replicas * train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
    except (CheckpointError, OSError):
        pass
    return None


def first_batch(config: Config, world_size: int) -> int:
    """Before the first checkpoint: what the configuration says, on these ranks or the fewest it is made for."""
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
                tree["train"] |= {
                    "per_device_train_batch_size": size,
                    "gradient_accumulation_steps": batch // dp_size // size,
                }
                try:
                    found = Config.model_validate(tree)
                    Layout.of(found, world_size)
                except (ValidationError, ConfigError):
                    continue
                yield found


def _down(number: int) -> range:
    return range(number, 0, -1)
