"""Shapes of a checkpoint's tensors against those that the model has: what no hash can tell. No torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from moe_dist.checkpoint.storage.manifest import Manifest
from moe_dist.config import LoraConfig, ModelConfig
from moe_dist.models.adapter_shapes import adapter_shapes
from moe_dist.models.shapes import logical_shapes, stack_of

Shape = tuple[int, ...]
MODEL, OPTIMIZER = "model.", "optimizer."
SAVE_WEIGHTS = "the weights are whole: go on from them alone with checkpoint.load_optimizer=false"


def shapes_of(manifest: Manifest) -> dict[str, Shape]:
    """Name -> shape of every tensor."""
    return {name: entry.shape for name, entry in manifest.tensors.items()}


def weight_source(name: str, tensors: Container[str]) -> str:
    """Which tensor of a checkpoint is the weight `name` (a name of the model, without `model.`), in full precision.

    Weights of a run in `pure_bf16` once stood there rounded, beside `master` in the optimizer's state.
    """
    master = f"{OPTIMIZER}{name}.master"
    return master if master in tensors else f"{MODEL}{name}"


def wrong_weights(found: Mapping[str, Shape], model: Mapping[str, Shape]) -> Iterator[str]:
    """Weights and buffers of another shape than the model's (its names are without `model.`), or not of the model."""
    for name, shape in found.items():
        if not name.startswith(MODEL):
            continue
        wanted = model.get(name.removeprefix(MODEL))
        if wanted is None:
            yield f"{name} {list(shape)} is not of the model"
        elif shape != wanted:
            yield f"{name} is {list(shape)}, the model has {list(wanted)}"


def missing_weights(found: Iterable[str], model: Iterable[str]) -> list[str]:
    """Names of the model that are not there."""
    return sorted({f"{MODEL}{name}" for name in model} - set(found))


def wrong_moments(found: Mapping[str, Shape], model: Mapping[str, Shape]) -> Iterator[str]:
    """The optimizer's tensors whose shape does not fit the weight they belong to."""
    for full_name, shape in found.items():
        if not full_name.startswith(OPTIMIZER):
            continue
        name, _, key = full_name.removeprefix(OPTIMIZER).rpartition(".")
        stack, is_one = stack_of(name)
        weight = model.get(stack)
        if weight is not None and is_one:
            weight = weight[1:]
        if weight is None:
            yield f"{full_name} {list(shape)} belongs to no weight of the model"
        elif shape not in _allowed(key, weight):
            yield f"{full_name} is {list(shape)}, its weight {list(weight)}"


def _allowed(key: str, weight: Shape) -> tuple[Shape, ...]:
    """Shapes that a state of this name has for a weight of this shape."""
    rows, columns = weight[:-1], weight[:-2] + weight[-1:]
    special: dict[str, tuple[Shape, ...]] = {
        "step": ((), weight[:1]),  # one, or one per expert of a stack
        "exp_avg_sq_row": (rows,),
        "exp_avg_sq_col": (columns,),
        "row_var": ((*rows, 1),),  # torch's Adafactor, before `transformers`' was used
        "col_var": ((*weight[:-2], 1, *weight[-1:]),),
    }
    return special.get(key, (weight,))


def moment_problems(manifest: Manifest) -> list[str]:
    """What is wrong with the optimizer's tensors of a checkpoint by its own weights: one line, or none."""
    found = shapes_of(manifest)
    weights = {name.removeprefix(MODEL): shape for name, shape in found.items() if name.startswith(MODEL)}
    wrong = list(wrong_moments(found, weights))
    if not wrong:
        return []
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    why = ""
    if manifest.layout.get("zero_stage") in (1, 2):
        why = (
            ": one rank's part alone, as a save right after an evaluation once wrote it with parallel.zero_stage 1 or 2"
        )
    return [f"{wrong[0]}{more}{why}; {SAVE_WEIGHTS}"]


def has_adapters_alone(tensors: Container[str], lora: LoraConfig) -> bool:
    """Whether a checkpoint of a run with adapters has left out the model, which lies where the run started from."""
    return bool(lora.r) and f"{MODEL}embed_tokens.weight" not in tensors


def expected_shapes(model: ModelConfig, lora: LoraConfig, tensors: Container[str]) -> dict[str, Shape]:
    """What a checkpoint of such a run has, by names of the model."""
    adapters = adapter_shapes(model, lora)
    return adapters if has_adapters_alone(tensors, lora) else logical_shapes(model) | adapters


def configuration_problems(manifest: Manifest, config: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """Weights that are not those of the configuration they were saved with, and what could not be compared.

    No class is imported for this: a checkpoint that names one must not run code here.
    """
    try:
        model = ModelConfig.model_validate(config.get("model"))
        lora = LoraConfig.model_validate(config.get("lora") or {})
    except ValidationError:
        return [], "the configuration it was saved with is not one that this version knows: shapes were not compared"
    found = shapes_of(manifest)
    expected = expected_shapes(model, lora, found)
    own = {".moe.experts.": ("expert", model.expert), ".moe.router.": ("router", model.router)}
    unknown = {part: key for part, key in own.items() if not any(part in name for name in logical_shapes(model))}
    known = {name: shape for name, shape in found.items() if not any(part in name for part in unknown)}
    wrong = list(wrong_weights(known, expected))
    wrong += [f"{name} is missing" for name in missing_weights(found, expected)]
    classes = " and ".join(f"model.{key}={value}" for key, value in unknown.values()) if model.moe_layers else ""
    return wrong, f"{classes}: shapes of a class of one's own were not compared" if classes else None
