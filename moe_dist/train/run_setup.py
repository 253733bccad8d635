"""Before the first step: one configuration out of what was given, a run folder, and words about what will run."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_dist.checkpoint.lock import Job, RunLock
from moe_dist.checkpoint.ownership import read_claim
from moe_dist.checkpoint.run_folder import CONFIG, refuse_foreign, with_header
from moe_dist.checkpoint.storage import open_storage
from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.config import Config, ConfigError, ModelConfig, dump_config, load_config, load_mapping
from moe_dist.config.trained_weights import ChosenExperts, TrainedWeights
from moe_dist.data.losses import cut_off, losses
from moe_dist.models.adapter_shapes import adapter_counts
from moe_dist.models.counts import parameter_counts
from moe_dist.models.trained_counts import has_own_classes, trained_counts
from moe_dist.models.transformer import Transformer
from moe_dist.monitor.records import RunInfo
from moe_dist.monitor.train_log import setup_logging
from moe_dist.parallel.layout import layers_by_pp_rank
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.build import Datasets
from moe_dist.train.counters import Counters
from moe_dist.train.hf_arguments import settings_of
from moe_dist.train.run_summary import copies_line, layout_lines, sentence

logger = logging.getLogger("moe_dist")


def merge_config(
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None,
    model_config: Mapping[str, Any] | None,
    training_config: Any,
    output_dir: str | os.PathLike[str] | None,
) -> Config:
    """One validated configuration: `config`, and the others over it. Raises ConfigError as reading a file does."""
    changes = {"model": dict(model_config or {})}
    if training_config is not None:
        changes["training"] = settings_of(training_config)
    if isinstance(config, (str, os.PathLike)):
        merged = load_config(config, changes=changes)
    elif isinstance(config, Config) and not any(changes.values()):
        merged = config.model_copy(deep=True)
    else:
        tree = config.model_dump(mode="json") if isinstance(config, Config) else dict(config or {})
        merged = load_mapping(tree, changes=changes, notice=lambda text: None)
    if output_dir is not None:
        if not os.fspath(output_dir).strip():
            raise ConfigError("output_dir is empty: give a folder; '.' is this one")
        merged.train.output_dir = Path(output_dir)
        if config is None and (training_config is None or isinstance(training_config, Mapping)):
            _checkpoints_apart(merged)
    return merged


def _checkpoints_apart(config: Config) -> None:
    """A run configured in Python alone saves in output_dir/checkpoints, if it has no checkpoint beside it yet."""
    folder = config.train.output_dir
    if config.checkpoint.folder is None and not any(folder.glob("checkpoint-*")):
        config.checkpoint.folder = str(folder / "checkpoints")


def architecture_of(model: Any) -> Mapping[str, Any] | None:
    """The section `model` of what a program gives as its model. Raises ConfigError for what is none."""
    if model is None or isinstance(model, Mapping):
        return model
    config = model.config if isinstance(model, Transformer) else model
    if not isinstance(config, ModelConfig):
        raise ConfigError(
            f"model={type(model).__name__}: a moe_dist Transformer, a ModelConfig or a mapping of its keys; of another "
            "library's model give the config.json, as model={'from': FOLDER}"
        )
    return config.model_dump(mode="json")


def one_of(name: str, value: Any, other: str, other_value: Any) -> Any:
    """The one that is given of two names for the same thing. Raises ConfigError for both."""
    if value is not None and other_value is not None:
        raise ConfigError(f"{name} and {other} are two names of one thing: give one of them")
    return other_value if value is None else value


class RunStart(NamedTuple):
    """Who writes: the run's id and which start of it this is, the same on every rank; the lock on rank 0."""

    run: str
    """A new one when this start begins afresh."""
    earlier: str
    """The run that the folder has been of so far."""
    generation: int
    resume: str
    """What this start goes on from: `checkpoint.resume`, or `auto` when an earlier start of the job has begun."""
    load_optimizer: bool
    """Whether with its moments: `checkpoint.load_optimizer`, or true when an earlier start of the job has begun."""
    names: tuple[str, ...]
    """Of the job, to be noted when it has begun."""
    lock: RunLock | None


def take_run_folder(config: Config, mesh: Mesh, job: Job) -> RunStart:
    """Keep others out of the run folder, and log from now on, in memory until `begin`; every rank calls it.

    Nothing that lies there is changed. Raises CheckpointError on every rank when somebody is in there, or when the
    folder holds a file that is not of a run, and that a run would write over.
    """
    held: list[RunLock] = []
    # Every machine may know the job by another name. And one that resumes otherwise is another job.
    jobs, resuming = mesh.from_all(job), config.checkpoint.resume
    if not config.checkpoint.load_optimizer:
        resuming += " without moments"
    names = sorted({f"{name}: {resuming}" for one in jobs for name in one.names})
    earlier = {f"{name}: {resuming}" for one in jobs for name in one.earlier}

    def take() -> tuple[str, str, int, str, bool]:
        lock, resume, load_optimizer = _lock_run_folder(config, earlier)
        held.append(lock)
        run = secrets.token_hex(8) if resume == "never" else lock.run
        return run, lock.run, lock.generation, resume, load_optimizer

    mine = mesh.ask_rank_zero(take)
    setup_logging(config.train.output_dir, mesh.rank)
    return RunStart(*mine, tuple(names), held[0] if held else None)


def _lock_run_folder(config: Config, earlier: set[str]) -> tuple[RunLock, str, bool]:
    """The lock, what to go on from, and whether with the optimizer's moments; `earlier` as in `Job`."""
    folder, resume, load_optimizer = config.train.output_dir, config.checkpoint.resume, config.checkpoint.load_optimizer
    storage = open_storage(config.checkpoint.folder or folder)
    seen = max(storage.newest_generation(), int(read_claim(storage).get("generation", 0)))
    try:
        lock = RunLock.acquire(folder, seen)
    except OSError as error:
        raise CheckpointError(f"train.output_dir={folder}: cannot be written to: {error.strerror}") from error
    try:
        refuse_foreign(folder, None if lock.is_first else lock.run)
        steps = storage.candidates()
        if earlier.intersection(lock.begun) and (resume == "never" or steps):
            resume, load_optimizer = "auto", True
        if resume == "never" and steps and not storage.renames:
            raise CheckpointError(
                f"checkpoint.resume=never: {storage.where} holds checkpoints of an earlier start (the newest of step "
                f"{steps[-1]}), and nothing can be renamed there: give another checkpoint.folder, or remove them"
            )
    except BaseException:
        lock.leave()
        raise
    return lock, resume, load_optimizer


def write_config(config: Config, run: str) -> None:
    """config.yaml of the run folder, as this start of the run has it (rank 0)."""
    path = config.train.output_dir / CONFIG
    whole = path.with_suffix(".yaml.part")
    whole.write_bytes(with_header(dump_config(config), run).encode())
    whole.replace(path)


def log_skipped_documents(datasets: Datasets) -> None:
    """Each into the log, and their number to people."""
    skipped = datasets.skipped
    for document in skipped:
        logger.info("left out: %s at %s: %s", document.id, document.offset, document.reason)
    if skipped:
        logger.warning("%s; train.log names all", losses(skipped, datasets.num_documents))
    for document in datasets.truncated:
        logger.info("cut off: %s: %s", document.id, document.reason)
    if truncated := datasets.truncated:
        logger.warning("%s; train.log names all", cut_off(truncated))


def run_info(
    config: Config,
    mesh: Mesh,
    datasets: Datasets,
    run_id: str,
    counters: Counters,
    memory_before: int = 0,
    chosen: ChosenExperts | None = None,
    pretrained: dict[str, Any] | None = None,
) -> RunInfo:
    """What is about to run, for people (collective: every rank tells its host)."""
    trainable, total, active = model_sizes(config, chosen)
    copies = copies_line(config, mesh.layout)
    return RunInfo(
        sentence=sentence(config, mesh.layout, mesh.device.type, _num_tokens(datasets), (total, active)),
        layout=layout_lines(mesh.layout, config.model.num_experts) + ([] if copies is None else [copies]),
        trainable_params=trainable,
        total_params=total,
        active_params=active,
        config_text=dump_config(config),
        output_dir=str(config.train.output_dir),
        world_size=mesh.layout.world_size,
        device=mesh.device.type,
        device_name=torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "",
        memory_before=memory_before,
        hosts=mesh.from_all(socket.gethostname()),
        stage_of_rank=[mesh.layout.coordinates(rank)[0] for rank in range(mesh.layout.world_size)],
        stage_of_layer=_stage_of_layer(config),
        domains=list(datasets.domains),
        run_id=run_id,
        pretrained=pretrained or {},
        start_step=counters.step,
        start_tokens=counters.tokens,
        start_skipped_steps=counters.skipped,
    )


def model_sizes(config: Config, chosen: ChosenExperts | None = None) -> tuple[int, int, int]:
    """Parameters of the whole model: trainable, all, active for a token. Own classes are counted as built."""
    model, trained = config.model, TrainedWeights.of(config, chosen)
    if not has_own_classes(config):
        counts, trainable = parameter_counts(model), trained_counts(config, trained).total
        adapters = sum(adapter_counts(model, config.lora))
        return trainable, counts.total + adapters, counts.active + _active_adapters(config)
    with torch.device("meta"):
        built = Transformer(model, config.balance)
        built.add_adapters(config.lora)
    built.freeze(trained)
    sizes = {name: parameter.numel() for name, parameter in built.named_parameters()}
    moved = {name: len(ids) / model.num_experts for name, ids in built.trained_in_part.items()}
    trainable = sum(
        round(sizes[name] * moved.get(name, 1))
        for name, parameter in built.named_parameters()
        if parameter.requires_grad
    )
    experts = sum(sizes[name] for name in built.expert_parameter_names())
    idle = experts * (model.num_experts - model.num_experts_per_tok) // max(1, model.num_experts)
    return trainable, sum(sizes.values()), sum(sizes.values()) - idle


def _active_adapters(config: Config) -> int:
    """Weights of adapters that a token passes through."""
    dense, experts = adapter_counts(config.model, config.lora)
    return dense + experts * config.model.num_experts_per_tok // max(1, config.model.num_experts)


def _stage_of_layer(config: Config) -> list[int]:
    if config.parallel.pp_size == 1:
        return [0] * config.model.num_hidden_layers
    stages = enumerate(layers_by_pp_rank(config))
    by_layer = [(layer, pp_rank) for pp_rank, ranges in stages for layers in ranges for layer in layers]
    return [pp_rank for _, pp_rank in sorted(by_layer)]


def _num_tokens(datasets: Datasets) -> int | None:
    return getattr(datasets.train, "num_tokens", None)
