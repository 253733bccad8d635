"""Before the first step: one configuration out of what was given, a run folder, and words about what will run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_dist.config import Config
from moe_dist.config_loading import dump_config, load_config, load_mapping
from moe_dist.models.counts import parameter_counts
from moe_dist.monitor.records import RunInfo
from moe_dist.monitor.train_log import setup_logging
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.build import Datasets
from moe_dist.train.describe import layout_lines, sentence


def merge_config(
    config: Config | Mapping[str, Any] | str | Path | None,
    model_config: Mapping[str, Any] | None,
    training_config: Any,
    output_dir: str | Path | None,
) -> Config:
    """One validated configuration. Raises ConfigError as reading a file does."""
    if isinstance(config, (str, Path)):
        merged = load_config(config)
    elif isinstance(config, Config):
        merged = config.model_copy(deep=True)
    else:
        tree: dict[str, Any] = dict(config or {})
        if model_config:
            tree["model"] = {**tree.get("model", {}), **model_config}
        if training_config:
            tree["training"] = {**tree.get("training", {}), **_chosen(training_config)}
        merged = load_mapping(tree, notice=lambda text: None)  # sections are ours to fill in
    if output_dir is not None:
        merged.train.output_dir = Path(output_dir)
    return merged


def _chosen(arguments: Any) -> dict[str, Any]:
    """A mapping as it is; of a dataclass such as `TrainingArguments` the fields that differ from their defaults."""
    if isinstance(arguments, Mapping):
        return dict(arguments)
    chosen = {}
    for field in dataclasses.fields(arguments):
        default = field.default_factory() if callable(field.default_factory) else field.default
        value = getattr(arguments, field.name)
        if value != default and field.init and value is not None:
            chosen[field.name] = value
    return chosen


def prepare_run_folder(config: Config, mesh: Mesh) -> None:
    """Create the run folder with its config.yaml and logs; every rank calls it.

    With `checkpoint.resume: never` an earlier run's folder is moved aside, so nothing is lost and nothing mixed.
    """
    folder = config.train.output_dir
    if mesh.rank == 0:
        if config.checkpoint.resume == "never" and (folder / "config.yaml").exists():
            stamp = time.strftime("%Y%m%d-%H%M%S")
            names = (f"{folder.name}-{stamp}{suffix}" for suffix in ("", *(f"-{number}" for number in range(1, 1000))))
            folder.rename(next(path for name in names if not (path := folder.with_name(name)).exists()))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config))
    mesh.barrier()
    setup_logging(folder, mesh.rank)


def run_info(config: Config, mesh: Mesh, datasets: Datasets) -> RunInfo:
    """What is about to run, for people."""
    counts = parameter_counts(config.model)
    frozen = counts.router if config.balance.freeze_router else 0
    return RunInfo(
        sentence=sentence(config, mesh.layout, mesh.device.type, num_tokens=_num_tokens(datasets)),
        layout=layout_lines(mesh.layout, config.model.num_experts),
        trainable_params=counts.total - frozen,
        total_params=counts.total,
        active_params=counts.active,
        config_text=dump_config(config),
        output_dir=str(config.train.output_dir),
        world_size=mesh.layout.world_size,
        device=mesh.device.type,
    )


def _num_tokens(datasets: Datasets) -> int | None:
    return getattr(datasets.train, "num_tokens", None)
