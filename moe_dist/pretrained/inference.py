"""A model to use: from a run, one of its checkpoints, or a Hugging Face folder, in any layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_dist.checkpoint.reading import CheckpointRef, read_trainer_state, whole
from moe_dist.checkpoint.shapes import has_adapters_alone, weight_source
from moe_dist.checkpoint.storage import open_storage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.config import Config, ConfigError, LoraConfig, load_config, load_mapping
from moe_dist.config.model_source import hub_name
from moe_dist.models.adapter_shapes import adapter_shapes

if TYPE_CHECKING:
    from moe_dist.data.tokenizer import Tokenizer
    from moe_dist.models.transformer import Transformer
    from moe_dist.parallel.mesh import Mesh

_OF_THE_MODEL = ("model", "data", "balance", "lora")
"""Sections of a run that say what its model computes and on what; how it was trained is left behind."""
ADAPTER_CONFIG = "adapter_config.json"
_OF_HELD_OUT = ("seed", "eval_batches", "per_device_eval_batch_size", "per_device_train_batch_size")
"""Keys of `train` that say which text is held out, and how much of it is measured."""


class Source(NamedTuple):
    """Where a model is. `checkpoint`: None for a Hugging Face folder, which the configuration names, as it does the
    model of a checkpoint that has adapters alone."""

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
    adapter: str | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Source:
    """Which model `place` means: a run folder or URL (its newest checkpoint, or `step`), one checkpoint, or a folder or
    name of Hugging Face. `overrides` are keys of a run file, of the layout above all. Every byte of a checkpoint is
    checked, unless `check` is off. `adapter`: adapters beside a Hugging Face folder, of a checkpoint (then `step` is
    its) or a folder for PEFT. Imports no torch.

    Raises ConfigError where there is no such thing, or it is damaged.
    """
    base: dict[str, Any] = {"launch": {"nproc_per_node": nproc}, "train": {"pure_bf16": dtype == "bf16"}}
    base["train"]["gradient_accumulation_steps"] = 64  # a pipeline wants micro-batches, which nothing here has
    folder = None
    if (Path(place) / "config.json").is_file() or (not Path(place).exists() and hub_name(place) is not None):
        folder = place
        if adapter is None or (Path(adapter) / ADAPTER_CONFIG).is_file():
            if step is not None:
                raise ConfigError(f"--step {step}: {adapter or place} is a Hugging Face folder, which has no steps")
            base |= {"model": {"from_pretrained": place}, "lora": {} if adapter is None else _peft(Path(adapter))}
            return Source(load_mapping(base, overrides, notice=notice), None)
    elif adapter is not None:
        raise ConfigError(
            f"--adapter-path {adapter}: MODEL is the Hugging Face folder these adapters belong to, not {place}; a "
            "checkpoint with adapters needs no other, and is a MODEL by itself"
        )
    try:
        found = _checkpoint(adapter or place, step)
        if check and (wrong := whole(found)):
            raise ConfigError(f"{wrong[0]} (and more: moe-dist checkpoint verify)" if len(wrong) > 1 else wrong[0])
        manifest = found.storage.manifest(found.step)
        state = read_trainer_state(found, manifest, Keys(keys))
        saved = state["config"]
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    base["train"] |= {key: value for key, value in saved.get("train", {}).items() if key in _OF_HELD_OUT}
    tree = base | {name: saved[name] for name in _OF_THE_MODEL if name in saved}
    lora = tree["lora"] = {**tree.get("lora", {}), "from_adapter": None, "merge_and_save": False}
    alone = has_adapters_alone(manifest.tensors, LoraConfig(r=lora.get("r", 0)))
    if folder is not None and not alone:
        has = "has its model with its adapters" if lora.get("r") else "has no adapters (lora.r=0)"
        raise ConfigError(f"--adapter-path {found}: {has}; give it as MODEL")
    if alone and folder is None:
        folder = str((state.get("pretrained") or {}).get("folder"))
        if not Path(folder).is_dir():
            raise ConfigError(
                f"{found}: the model of its adapters, {folder}, is not there; give it as MODEL --adapter-path {found}"
            )
    # The weights are in the checkpoint, but for adapters alone.
    tree["model"] = {**tree.get("model", {}), "from_pretrained": folder if alone else None}
    return Source(load_mapping(tree, overrides, notice=notice), found)


def _peft(folder: Path) -> dict[str, Any]:
    """The section `lora` of a folder for PEFT. Raises ConfigError; whether it is right is found out on reading it."""
    said = f"--adapter-path {folder}"
    try:
        found = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
        words = {name.rpartition(".")[2] for name in found.get("target_modules") or []}
        for name in found.get("target_parameters") or []:
            *_, module, parameter = name.split(".")
            words.add(f"experts.{parameter}" if module == "experts" else "gate" if module == "router" else module)
        lora = {"r": found["r"], "alpha": found["lora_alpha"], "rslora": found.get("use_rslora", False)}
        lora["use_dora"] = found.get("use_dora", False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{said}: {ADAPTER_CONFIG} cannot be read: {error!r}") from None
    return lora | {"target_modules": sorted(words), "from_adapter": str(folder)}


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
    from moe_dist.pretrained.adapters import load_adapter
    from moe_dist.pretrained.loading import load_pretrained

    config, mesh = source.config, mesh or AnyMesh.single()
    model = build_part(config, mesh)
    if config.model.from_pretrained is not None:
        model.initialize(config.train.seed, mesh.device)  # a selection bias that a folder has not
        found = load_pretrained(model, config.model, mesh)
        if source.checkpoint is not None:
            _same_model(source.checkpoint, Keys(keys), found.provenance)
        if config.lora.from_adapter is not None:
            load_adapter(model, config, mesh)
    else:
        model.to_empty(device=mesh.device)
        model.tie() if config.model.tie_word_embeddings else None
    if source.checkpoint is not None:
        _read(model, source.checkpoint, Keys(keys), adapters_alone=config.model.from_pretrained is not None)
    if config.train.pure_bf16:
        model.round_weights(torch.bfloat16)
        model.masters.clear()
    model.requires_grad_(False)
    return model.eval(), load_tokenizer(config.data.tokenizer)


def _same_model(found: CheckpointRef, keys: Keys, there: dict[str, Any]) -> None:
    """Raises ConfigError where adapters belong to another model than the one that was read."""
    saved = read_trainer_state(found, found.storage.manifest(found.step), keys).get("pretrained") or {}
    if wrong := sorted({name for name, _ in set(saved.get("files", {}).items()) ^ set(there["files"].items())}):
        raise ConfigError(
            f"{found}: {wrong[0]} of {there['folder']} is not what its adapters were trained on "
            f"({saved.get('folder')}); give that model by --adapter-path {found}"
        )


def _read(model: Transformer, found: CheckpointRef, keys: Keys, adapters_alone: bool) -> None:
    """Set what a rank holds of the model from a checkpoint, whatever layout wrote it."""
    import torch

    from moe_dist.checkpoint.tools.inspecting import Tensors
    from moe_dist.pretrained.loading import held_by
    from moe_dist.pretrained.source import WHOLE

    manifest = found.storage.manifest(found.step)
    tensors, held, done = Tensors(found, manifest, keys), held_by(model), set()
    wanted = model.state_dict()
    if adapters_alone:
        assert model.lora is not None
        wanted = {name: wanted[name] for name in wanted.keys() & adapter_shapes(model.config, model.lora).keys()}
    with torch.no_grad():
        for name, target in wanted.items():
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
