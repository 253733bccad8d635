"""A model to use: from a run, one of its checkpoints, or a Hugging Face folder, in any layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_dist.checkpoint.reading import CheckpointRef, read_trainer_state, whole
from moe_dist.checkpoint.shapes import weight_source
from moe_dist.checkpoint.storage import open_storage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.config import Config, ConfigError, load_config, load_mapping
from moe_dist.config.model_source import hub_name

if TYPE_CHECKING:
    from moe_dist.data.tokenizer import Tokenizer
    from moe_dist.models.transformer import Transformer
    from moe_dist.parallel.mesh import Mesh

_OF_THE_MODEL = ("model", "data", "balance")
"""Sections of a run that say what its model computes and on what; how it was trained is left behind."""

_OF_HELD_OUT = ("seed", "eval_batches", "per_device_eval_batch_size", "per_device_train_batch_size")
"""Keys of `train` that say which text is held out, and how much of it is measured."""


class Source(NamedTuple):
    """Where a model is. `checkpoint`: None for a Hugging Face folder, which the configuration names."""

    config: Config
    checkpoint: CheckpointRef | None

    def __str__(self) -> str:
        return str(self.checkpoint or self.config.model.from_pretrained)


def find_model(
    place: str,
    overrides: Sequence[str] = (),
    *,
    step: int | None = None,
    keys: Sequence[str] = (),
    nproc: int = 1,
    dtype: str = "fp32",
    check: bool = True,
    notice: Callable[[str], None] = lambda text: None,
) -> Source:
    """Which model `place` means: a run folder or URL (its newest checkpoint, or `step`), one checkpoint, or a folder or
    name of Hugging Face. `overrides` are keys of a run file, of the layout above all. Every byte of a checkpoint is
    checked, unless `check` is off. Imports no torch.

    Raises ConfigError where there is no such thing, or it is damaged.
    """
    base: dict[str, Any] = {"launch": {"nproc_per_node": nproc}, "train": {"pure_bf16": dtype == "bf16"}}
    base["train"]["gradient_accumulation_steps"] = 64  # a pipeline wants micro-batches, which nothing here has
    if (Path(place) / "config.json").is_file() or (not Path(place).exists() and hub_name(place) is not None):
        if step is not None:
            raise ConfigError(f"--step {step}: {place} is a Hugging Face folder, which has no steps")
        return Source(load_mapping(base | {"model": {"from_pretrained": place}}, overrides, notice=notice), None)
    try:
        found = _checkpoint(place, step)
        if check and (wrong := whole(found)):
            raise ConfigError(f"{wrong[0]} (and more: moe-dist checkpoint verify)" if len(wrong) > 1 else wrong[0])
        saved = read_trainer_state(found, found.storage.manifest(found.step), Keys(keys))["config"]
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    base["train"] |= {key: value for key, value in saved.get("train", {}).items() if key in _OF_HELD_OUT}
    tree = base | {name: saved[name] for name in _OF_THE_MODEL if name in saved}
    tree["model"] = {**tree.get("model", {}), "from_pretrained": None}  # the weights are in the checkpoint
    return Source(load_mapping(tree, overrides, notice=notice), found)


def _checkpoint(place: str, step: int | None) -> CheckpointRef:
    parent, _, name = place.rstrip("/").rpartition("/")
    one = re.fullmatch(r"checkpoint-(\d+)", name)
    if one is not None:
        if step not in (None, int(one[1])):
            raise ConfigError(f"--step {step}: {place} is step {one[1]}; give the run's folder, or leave --step out")
        return CheckpointRef(open_storage(parent or "."), int(one[1]))
    storage = open_storage(place)
    root = storage.local_path("")
    if root is not None and not root.is_dir():
        raise ConfigError(f"{place}: there is no such run, checkpoint or Hugging Face folder")
    if root is not None and (root / "config.yaml").is_file() and not storage.candidates():
        elsewhere = load_config(root / "config.yaml").checkpoint.folder
        storage = open_storage(elsewhere) if elsewhere else storage
    steps = storage.steps()
    if not steps or (step is not None and step not in steps):
        known = ", ".join(map(str, steps)) or "none"
        wanted = "" if step is None else f"--step {step}: "
        raise ConfigError(f"{wanted}{storage.where}: there is no such checkpoint; steps there: {known}")
    return CheckpointRef(storage, steps[-1] if step is None else step)


def open_model(source: Source, mesh: Mesh | None = None, keys: Sequence[str] = ()) -> tuple[Transformer, Tokenizer]:
    """This rank's part of the model with its weights, ready to compute, and the tokenizer. A collective.

    In bfloat16 with `train.pure_bf16` (routers stay exact), else in float32.
    """
    import torch

    from moe_dist.data.tokenizer import load_tokenizer
    from moe_dist.parallel.mesh import Mesh as AnyMesh
    from moe_dist.parallel.parallelize import build_part
    from moe_dist.pretrained.loading import load_pretrained

    config, mesh = source.config, mesh or AnyMesh.single()
    model = build_part(config, mesh)
    if source.checkpoint is None:
        model.initialize(config.train.seed, mesh.device)  # a selection bias that a folder has not
        load_pretrained(model, config.model, mesh)
    else:
        model.to_empty(device=mesh.device)
        model.tie() if config.model.tie_word_embeddings else None
        _read(model, source.checkpoint, Keys(keys))
    if config.train.pure_bf16:
        model.round_weights(torch.bfloat16)
        model.masters.clear()
    model.requires_grad_(False)
    return model.eval(), load_tokenizer(config.data.tokenizer)


def _read(model: Transformer, found: CheckpointRef, keys: Keys) -> None:
    """Set what a rank holds of the model from a checkpoint, whatever layout wrote it."""
    import torch

    from moe_dist.checkpoint.tools.inspecting import Tensors
    from moe_dist.pretrained.loading import held_by
    from moe_dist.pretrained.source import WHOLE

    manifest = found.storage.manifest(found.step)
    tensors, held, done = Tensors(found, manifest, keys), held_by(model), set()
    with torch.no_grad():
        for name, target in model.state_dict().items():
            experts = held(name)
            if experts is None or target.data_ptr() in done:  # of tied embeddings the other one
                continue
            source = weight_source(name, manifest.tensors)
            if source not in manifest.tensors:
                raise CheckpointError(f"{found}: it has no tensor {source}")
            start = 0 if experts == WHOLE else experts.start
            offset = (start, *[0] * (target.ndim - 1)) if target.ndim else ()
            target.copy_(tensors.read_box(source, offset, tuple(target.shape)))
            if target.numel():
                done.add(target.data_ptr())
    tensors.close()
