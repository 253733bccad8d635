"""A checkpoint of ours as a folder that `transformers`, vLLM and SGLang load, proven after writing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from moe_dist.checkpoint.reading import CheckpointRef, read_trainer_state
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError, Manifest
from moe_dist.config import Config, ConfigError, ModelConfig
from moe_dist.data.tokenizer import load_tokenizer
from moe_dist.models.huggingface import huggingface_config
from moe_dist.pretrained.fewer_experts import FewerExperts, busiest
from moe_dist.pretrained.model_card import model_card
from moe_dist.pretrained.safetensors_files import write_json, write_weights
from moe_dist.pretrained.saved_weights import SavedWeights
from moe_dist.pretrained.staging import copy_tokenizer, new_folder
from moe_dist.pretrained.verification import Checked, check_config, check_tensors, check_with_transformers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Exported(NamedTuple):
    """What was written. `checks`: empty of problems, or the folder is not there."""

    model_type: str
    num_tensors: int
    num_files: int
    num_bytes: int
    dtype: str
    checks: list[Checked]
    notes: list[str]

    @property
    def is_proven(self) -> bool:
        return not any(check.problems for check in self.checks)


class Fewer(NamedTuple):
    """How many experts of a layer stay, by the load that the folder of the run has on record.

    `measure`: says what that costs, of the configuration and the state that the trainer saved.
    """

    number: int
    run: Path
    measure: Callable[[Config, Mapping[str, Any], FewerExperts], Checked]


def export(
    found: CheckpointRef,
    manifest: Manifest,
    keys: Keys,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    logits: bool = True,
    fewer: Fewer | None = None,
    told: Callable[[Checked], None] = lambda check: None,
) -> Exported:
    """Write the Hugging Face folder `output`, verify it, and only then give it its name.

    `dtype`: a key of DTYPES; None: as saved. `logits`: load it in `transformers` too, which needs memory for the model
    twice in float32; all else holds one tensor at a time. `fewer`: leave experts out. `told` hears of every check as it
    ends. Where a check fails nothing is left. Raises ConfigError for a run that no family can express, and for an
    `output` that is there.
    """
    state = read_trainer_state(found, manifest, keys)
    config = _config_of(found, state)
    try:
        weights = _weights(found, manifest, keys, config.model, DTYPES[dtype] if dtype else None, fewer)
        values = huggingface_config(weights.config)
    except (CheckpointError, ConfigError):
        raise
    except ValueError as error:
        raise ConfigError(f"{found}: {error}") from error
    _refuse_temperature(found, config)
    with closing(weights), new_folder(output, "an export") as folder:
        files = write_weights(folder.path, weights, max_shard_bytes)
        ids, notes = _write_tokenizer(config, folder.path)
        kind = str(weights.dtype).removeprefix("torch.")
        card = model_card(weights, manifest, config, state, values["model_type"], kind)
        (folder.path / "README.md").write_text(card, encoding="utf-8")
        write_json(folder.path / "generation_config.json", ids)
        # The key of transformers 5, and the one before.
        write_json(folder.path / "config.json", values | ids | {"dtype": kind, "torch_dtype": kind})
        checks: list[Checked] = []
        for check in _checks(folder.path, weights, logits, fewer and partial(fewer.measure, config, state)):
            checks.append(check)
            told(check)
        tensors = [tensor for file in files.values() for tensor in file]
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        exported = Exported(values["model_type"], len(tensors), len(files), num_bytes, kind, checks, notes)
        if exported.is_proven:
            folder.publish()
        return exported


def _weights(
    found: CheckpointRef,
    manifest: Manifest,
    keys: Keys,
    model: ModelConfig,
    dtype: torch.dtype | None,
    fewer: Fewer | None,
) -> SavedWeights:
    if fewer is None:
        return SavedWeights(found, manifest, keys, model, dtype)
    return FewerExperts(found, manifest, keys, model, dtype, busiest(fewer.run, found.step, model, fewer.number))


def _checks(
    folder: Path, weights: SavedWeights, logits: bool, measure: Callable[[FewerExperts], Checked] | None
) -> Iterator[Checked]:
    """What must hold of an exported folder, and what leaving experts out has cost; each when it is asked for."""
    yield check_tensors(folder, weights)
    of = "the run's model"
    if isinstance(weights, FewerExperts):
        of += f" with {weights.kept.number} experts"
    yield check_config(folder, weights.config, of)
    if logits:
        yield from check_with_transformers(folder, weights)
        if measure is not None and isinstance(weights, FewerExperts):
            yield measure(weights)


def _config_of(found: CheckpointRef, state: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(state["config"])
    except (KeyError, ValidationError) as error:
        raise ConfigError(
            f"{found}: the configuration it was saved with is not one that this version knows; go on from it by one "
            "step first, which saves it anew"
        ) from error


def _refuse_temperature(found: CheckpointRef, config: Config) -> None:
    """Router logits that are still divided by something: Hugging Face's models do not divide."""
    balance = config.balance
    moving = balance.router_temperature_steps
    if balance.router_temperature != 1.0 and (not moving or found.step < moving):
        still = f", which it would be from step {moving} on" if moving else ""
        raise ConfigError(
            f"{found}: balance.router_temperature={balance.router_temperature} is not 1 at this step{still}, and no "
            "Hugging Face model divides router logits"
        )


def _write_tokenizer(config: Config, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Copy a tokenizer that is a folder. Returns the ids of special tokens, and what people should know."""
    name = config.data.tokenizer
    source = Path(name).expanduser()
    notes = []
    if name != "bytes":
        copy_tokenizer(source, folder)
    if name == "bytes":
        notes.append("tokens are UTF-8 bytes (data.tokenizer=bytes): Hugging Face has no such tokenizer, none is there")
    elif not source.is_dir():
        notes.append(f"the tokenizer {name} is no folder here: its files are not in the export")
    try:
        tokenizer = load_tokenizer(name)
    except (ValueError, ImportError) as error:
        return {}, [*notes, f"the ids of its special tokens are not in config.json: {error}"]
    return {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}, notes
