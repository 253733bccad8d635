"""A checkpoint of ours as a folder for `transformers`, vLLM and SGLang, or under our own names; proven when written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from moe_dist.checkpoint.reading import CheckpointRef, read_trainer_state
from moe_dist.checkpoint.shapes import MODEL, configuration_problems
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError, Manifest
from moe_dist.config import Config, ConfigError, ModelConfig
from moe_dist.models.huggingface import huggingface_config
from moe_dist.pretrained.adapters import MergedWeights, saved_adapter
from moe_dist.pretrained.fewer_experts import FewerExperts, busiest
from moe_dist.pretrained.model_card import model_card
from moe_dist.pretrained.own_format import MODEL_TYPE, OwnWeights, own_config, read_own_config
from moe_dist.pretrained.peft_format import read_adapter, write_adapter
from moe_dist.pretrained.safetensors_files import write_json, write_weights
from moe_dist.pretrained.saved_weights import SavedWeights
from moe_dist.pretrained.staging import new_folder, refuse_existing
from moe_dist.pretrained.tokenizer_files import write_tokenizer
from moe_dist.pretrained.verification import (
    Checked,
    check_config,
    check_tensors,
    check_with_transformers,
    public_names,
)

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


class Source(NamedTuple):
    """A checkpoint to export, and what it was saved with."""

    checkpoint: CheckpointRef
    manifest: Manifest
    keys: Keys
    config: Config
    state: dict[str, Any]

    @property
    def temperature(self) -> float:
        """What its router logits are divided by."""
        return self.config.balance.temperature_at(self.checkpoint.step)


OnCheck = Callable[[Checked], None]


def export(
    found: CheckpointRef,
    manifest: Manifest,
    keys: Keys,
    output: Path,
    *,
    to: str = "hf",
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    logits: bool = True,
    fewer: Fewer | None = None,
    merge: bool = False,
    on_check: OnCheck = lambda check: None,
) -> Exported:
    """Write the folder `output`, verify it, and only then give it its name.

    `to`: `hf`; `safetensors` for our own names; `onnx`. `dtype`: a key of DTYPES; None: as saved. `logits`: load a
    Hugging Face folder in `transformers` too, which needs memory for the model twice in float32, and ONNX takes that
    several times; all else holds one tensor at a time. `merge`: of a run with adapters the model with these added, not
    a folder of adapters for `peft`. `on_check` is called with every check as it ends. Where a check fails nothing is
    left. Raises ConfigError for a run that cannot be written so, and for an `output` that is there.
    """
    refuse_existing(output)
    source = read_source(found, manifest, keys)
    kind = DTYPES[dtype] if dtype else None
    if to != "hf" and fewer is not None:
        raise ConfigError("--drop-experts: only with --to hf")
    if has_adapters := bool(source.config.lora.r):
        if to != "hf" or fewer is not None:
            raise ConfigError(
                f"{'--drop-experts' if to == 'hf' else f'--to {to}'}: not of a run with adapters (lora.r)"
            )
        if not merge:
            return _export_adapter(source, output, kind, on_check)
    if merge and not has_adapters:
        raise ConfigError(f"--merge: {found} has no adapters (lora.r=0); leave it out")
    if to == "onnx":
        return _export_onnx(source, output, kind, on_check)
    if to == "safetensors":
        return _export_own(source, output, kind, max_shard_bytes, on_check)
    return _export_huggingface(source, output, kind, max_shard_bytes, logits, fewer, on_check)


def read_source(found: CheckpointRef, manifest: Manifest, keys: Keys) -> Source:
    """Raises ConfigError for a configuration that this version does not know."""
    state = read_trainer_state(found, manifest, keys)
    try:
        return Source(found, manifest, keys, Config.model_validate(state["config"]), state)
    except (KeyError, ValidationError) as error:
        raise ConfigError(
            f"{found}: the configuration it was saved with is not one that this version knows; go on from it by one "
            "step first, which saves it anew"
        ) from error


def _export_huggingface(
    source: Source,
    output: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    logits: bool,
    fewer: Fewer | None,
    on_check: OnCheck,
) -> Exported:
    found, config = source.checkpoint, source.config
    try:
        weights = _weights(source, dtype, fewer)
        values = huggingface_config(weights.config)
    except (CheckpointError, ConfigError):
        raise
    except ValueError as error:
        raise ConfigError(f"{found}: {error}") from error
    _refuse_temperature(source)

    def checks(folder: Path) -> Iterator[Checked]:
        yield check_tensors(folder, weights, public_names(weights.config))
        of = "the run's model"
        if isinstance(weights, FewerExperts):
            of += f" with {weights.kept.number} experts"
        yield check_config(folder, weights.config, of)
        if logits:
            yield from check_with_transformers(folder, weights)
            if fewer is not None and isinstance(weights, FewerExperts):
                yield fewer.measure(config, source.state, weights)

    def write_config(folder: Path, ids: dict[str, Any], kind: str) -> None:
        write_json(folder / "generation_config.json", ids)
        # The key of transformers 5, and the one before.
        write_json(folder / "config.json", values | ids | {"dtype": kind, "torch_dtype": kind})

    with closing(weights):
        kind = values["model_type"]
        done = _write(source, output, weights, weights.config, kind, max_shard_bytes, write_config, checks, on_check)
    if isinstance(weights, MergedWeights):
        notes = [
            f"adapters are added to the weights; rounding to {done.dtype} takes {weights.rounding:.2%} of what they add"
        ]
        if (kind := source.config.lora.quantize) is not None:
            notes.append(f"they were trained beside weights in {kind}, and are added to those of the model as it was")
        return done._replace(notes=[*done.notes, *notes])
    return done


def _export_adapter(source: Source, output: Path, dtype: torch.dtype | None, on_check: OnCheck) -> Exported:
    """A folder for `peft`, read again."""
    model, lora, pretrained = source.config.model, source.config.lora, source.state.get("pretrained") or {}
    if lora.use_dora:
        merged = MergedWeights(source.checkpoint, source.manifest, source.keys, source.config, dtype, source.state)
        weights = merged.adapter()
        merged.close()
    else:
        weights = saved_adapter(source.checkpoint, source.manifest, source.keys, source.config)
    for name in weights if dtype is not None else ():
        if not name.endswith(".magnitude"):  # of which rounding takes more than training adds
            weights[name] = weights[name].to(dtype)
    kind = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    with new_folder(output, "an export") as folder:
        try:
            num_bytes = write_adapter(folder.path, model, lora, weights, pretrained.get("folder"))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{source.checkpoint}: {error}") from error
        again = read_adapter(folder.path, model, lora)
        wrong = [f"{name}: not the checkpoint's" for name in weights if not again[name].equal(weights[name].float())]
        check = Checked("adapters", f"{len(weights)} of {len(weights)} read again, as in the checkpoint", wrong)
        on_check(check)
        notes = [] if pretrained else ["the model of these adapters is in the checkpoint; --merge writes both as one"]
        exported = Exported("peft adapter", len(weights), 1, num_bytes, kind, [check], notes)
        if exported.is_proven:
            folder.publish()
        return exported


def _weights(source: Source, dtype: torch.dtype | None, fewer: Fewer | None) -> SavedWeights:
    where, model = (source.checkpoint, source.manifest, source.keys), source.config.model
    if source.config.lora.r:
        return MergedWeights(*where, source.config, dtype, source.state)
    if fewer is None:
        return SavedWeights(*where, model, dtype)
    return FewerExperts(*where, model, dtype, busiest(fewer.run, source.checkpoint.step, model, fewer.number))


def _export_own(
    source: Source, output: Path, dtype: torch.dtype | None, max_shard_bytes: int, on_check: OnCheck
) -> Exported:
    wrong, unknown = configuration_problems(source.manifest, source.state["config"])
    if wrong:
        raise CheckpointError(f"{source.checkpoint}: {wrong[0]}")
    weights = OwnWeights(source.checkpoint, source.manifest, source.keys, source.config.model, dtype)
    tied = {f"{MODEL}lm_head.weight"} if source.config.model.tie_word_embeddings else set()
    wanted = [
        name.removeprefix(MODEL) for name in source.manifest.tensors if name.startswith(MODEL) and name not in tied
    ]
    values = own_config(source.config.model, source.temperature)

    def checks(folder: Path) -> Iterator[Checked]:
        yield check_tensors(folder, weights, wanted)
        is_same = read_own_config(folder / "config.json") == (source.config.model, source.temperature)
        problems = [] if is_same else ["config.json: is another model"]
        yield Checked("config.json", "is the run's model", problems)

    def write_config(folder: Path, ids: dict[str, Any], kind: str) -> None:
        write_json(folder / "config.json", values | {"dtype": kind})

    model = source.config.model
    with closing(weights):
        done = _write(source, output, weights, model, MODEL_TYPE, max_shard_bytes, write_config, checks, on_check)
    return done._replace(notes=[*done.notes, *([unknown] if unknown else [])])


def _export_onnx(source: Source, output: Path, dtype: torch.dtype | None, on_check: OnCheck) -> Exported:
    from moe_dist.pretrained.onnx_export import build, refuse_onnx, write_onnx

    if dtype not in (None, torch.float32):
        raise ConfigError("--dtype: an ONNX model is written in float32; round it with tools of ONNX Runtime")
    refuse_onnx(source.config)
    with new_folder(output, "an export") as folder:
        model = build(source.checkpoint, source.manifest, source.keys, source.config)
        num_tensors = len(model.state_dict())
        num_bytes, checks = write_onnx(model, folder.path)
        for check in checks:
            on_check(check)
        _, notes = write_tokenizer(source.config, folder.path)
        files = len(list(folder.path.glob("model.onnx*")))
        exported = Exported("onnx", num_tensors, files, num_bytes, "float32", checks, notes)
        if exported.is_proven:
            folder.publish()
        return exported


def _write(
    source: Source,
    output: Path,
    weights: SavedWeights | OwnWeights,
    model: ModelConfig,
    model_type: str,
    max_shard_bytes: int,
    write_config: Callable[[Path, dict[str, Any], str], None],
    checks: Callable[[Path], Iterable[Checked]],
    on_check: OnCheck,
) -> Exported:
    """Weights first, then what makes it a model: what is stopped in between looks like none."""
    with new_folder(output, "an export") as folder:
        files = write_weights(folder.path, weights, max_shard_bytes)
        ids, notes = write_tokenizer(source.config, folder.path)
        kind = str(weights.dtype).removeprefix("torch.")
        card = model_card(source.checkpoint, source.manifest, source.config, model, source.state, model_type, kind)
        (folder.path / "README.md").write_text(card, encoding="utf-8")
        write_config(folder.path, ids, kind)
        done: list[Checked] = []
        for check in checks(folder.path):
            done.append(check)
            on_check(check)
        tensors = [tensor for part in files.values() for tensor in part]
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        exported = Exported(model_type, len(tensors), len(files), num_bytes, kind, done, notes)
        if exported.is_proven:
            folder.publish()
        return exported


def _refuse_temperature(source: Source) -> None:
    """Router logits that are still divided by something: Hugging Face's models do not divide."""
    balance = source.config.balance
    if source.temperature != 1.0:
        moving = balance.router_temperature_steps
        still = f", which it would be from step {moving} on" if moving else ""
        raise ConfigError(
            f"{source.checkpoint}: balance.router_temperature={balance.router_temperature} is not 1 at this step{still}"
            ", and no Hugging Face model divides router logits"
        )
