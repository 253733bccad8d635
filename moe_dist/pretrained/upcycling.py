"""The folder of a model with experts, made of a dense one's, and held against it after writing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_dist.config import ModelConfig
from moe_dist.models.huggingface import huggingface_config
from moe_dist.pretrained.model_card import upcycled_card
from moe_dist.pretrained.safetensors_files import write_json, write_weights
from moe_dist.pretrained.staging import new_folder
from moe_dist.pretrained.tokenizer_files import copy_tokenizer
from moe_dist.pretrained.upcycled_weights import Dense, Recipe, UpcycledWeights, read_dense
from moe_dist.pretrained.verification import (
    NUM_PROMPTS,
    Checked,
    check_config,
    check_tensors,
    load_with_transformers,
    prompts_for,
    public_names,
    relative_difference,
    with_transformers,
)

MAX_DIFFERENCE = 1e-5
"""L2 of the difference of logits over L2, in float32, where the first pass equals the dense model's."""
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Upcycled(NamedTuple):
    """What was written. `checks`: empty of problems, or the folder is not there."""

    dense_type: str
    model_type: str
    config: ModelConfig
    num_files: int
    num_bytes: int
    dtype: str
    checks: list[Checked]

    @property
    def is_proven(self) -> bool:
        return not any(check.problems for check in self.checks)


def upcycle(
    folder: Path,
    recipe: Recipe,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    logits: bool = True,
    on_check: Callable[[Checked], None] = lambda check: None,
) -> Upcycled:
    """Write the folder `output`, verify it, and only then give it its name.

    `dtype`: of the weights; None: as in the dense model. `logits`: load both models in `transformers`, one after the
    other, in float32; all else holds one layer's MLP. `on_check` is called with every check as it ends. Where a check
    fails nothing is left. Raises ConfigError for what cannot be upcycled so, and for an `output` that is there.
    """
    dense = read_dense(folder)
    weights = UpcycledWeights(dense, recipe, dtype)
    with new_folder(output, "an upcycling") as new:
        files = write_weights(new.path, weights, max_shard_bytes)
        kind = str(max(weights.dtypes, key=lambda one: one.itemsize)).removeprefix("torch.")
        values = huggingface_config(weights.config)
        (new.path / "README.md").write_text(upcycled_card(weights, values["model_type"], kind), encoding="utf-8")
        ids = _token_ids(dense)
        copy_tokenizer(folder, new.path)
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", new.path / "generation_config.json")
        write_json(new.path / "config.json", values | ids | {"dtype": kind, "torch_dtype": kind})
        checks: list[Checked] = []
        for check in _checks(new.path, weights, logits):
            checks.append(check)
            on_check(check)
        num_bytes = sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)
        done = Upcycled(
            dense.found.family.model_type, values["model_type"], weights.config, len(files), num_bytes, kind, checks
        )
        if done.is_proven:
            new.publish()
        return done


def _token_ids(dense: Dense) -> dict[str, Any]:
    raw = json.loads((dense.folder / "config.json").read_text("utf-8"))
    return {key: raw[key] for key in _IDS if key in raw}


def _checks(folder: Path, weights: UpcycledWeights, logits: bool) -> Iterator[Checked]:
    yield check_tensors(folder, weights, public_names(weights.config))
    yield check_config(folder, weights.config, "the model asked for")
    if logits:
        yield check_against_dense(folder, weights)


@torch.no_grad()
def check_against_dense(folder: Path, weights: UpcycledWeights) -> Checked:
    """Logits of a few prompts of both folders in `transformers`, float32. Memory is that of the larger model."""
    prompts = prompts_for(weights.config)
    try:
        expected, problems = _logits(weights.dense.folder, prompts)
        found, more = _logits(folder, prompts)
    except ValueError as error:
        return Checked(with_transformers(), "", [str(error)])
    lacking = weights.names.optional
    problems = [line for line in (*problems, *more) if line.partition(": ")[2] not in lacking]
    errors = [relative_difference(*pair) for pair in zip(found, expected, strict=True)]
    reason = weights.inequality
    if reason is None:
        problems += [
            f"logits of prompt {number}: relative difference {error:.1e} from the dense model's"
            for number, error in enumerate(errors)
            if not error <= MAX_DIFFERENCE
        ]
    numbers = " ".join(f"{error:.1e}" for error in errors)
    said = f"{NUM_PROMPTS} prompts of {prompts.shape[1]} tokens, relative difference from the dense model's: {numbers}"
    return Checked("logits", said if reason is None else f"{said} ({reason})", problems)


def _logits(folder: Path, prompts: Tensor) -> tuple[list[Tensor], list[str]]:
    model, problems = load_with_transformers(folder)
    return [model(prompt[None]).logits for prompt in prompts], problems
