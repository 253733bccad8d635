"""Adapters as the package `peft` writes and reads them: adapter_model.safetensors and adapter_config.json.

Linear maps are in its `target_modules`, but for those of dense layers beside experts. These, stacks of experts, and
routers, which are parameters in `transformers`, are in `target_parameters`. Of stacks A is (E * r, in), the experts one
after the other, and B (out, r * E) with the expert index running fastest. Two parameters of one module nest, the first
within: `experts.base_layer.lora_A` is of gate and up, `experts.lora_A` of down. Of DoRA, which linear maps alone may
have, `lora_magnitude_vector` (out,) is the length of every row. Weights by our names are as in the model, but for that:
of a magnitude it is the whole length here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.config import ConfigError, LoraConfig, ModelConfig
from moe_dist.models.adapter_shapes import Target, targets
from moe_dist.models.tensor_names import Names, Part

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
VERSION = "0.21.2"
"""Of `peft`, whose format this is."""
_MAGNITUDE = "lora_magnitude_vector"
_FORMER_EXPERTS = (".gate_proj", ".up_proj", ".down_proj")
"""As `target_modules` PEFT reads these as the experts of transformers 4, also where they are of a dense layer."""
_WITHOUT = {
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "trainable_token_indices": None,
}
"""Keys of adapter_config.json that must have these values, or lack: anything else is not offered."""


class PeftTarget(NamedTuple):
    """One adapter by PEFT's name. `module`: the module's path in `transformers`; `parameter`: of it, or None where it
    is a linear map; `prefix`: of both tensors in the file."""

    ours: Target
    module: str
    parameter: str | None
    prefix: str
    part: Part

    def to_theirs(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Our A and B as PEFT's."""
        if not self.ours.num_experts:
            return a, b
        if self.part.interleaved:  # gate and up in turn
            b = b.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return a.transpose(1, 2).flatten(0, 1).contiguous(), b.permute(2, 1, 0).flatten(1).contiguous()

    def to_ours(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """PEFT's as ours; the inverse of `to_theirs`."""
        if not (experts := self.ours.num_experts):
            return a, b
        a, b = a.unflatten(0, (experts, -1)).transpose(1, 2), b.unflatten(1, (-1, experts)).permute(2, 1, 0)
        if self.part.interleaved:
            b = b.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return a.contiguous(), b.contiguous()


def peft_targets(model: ModelConfig, lora: LoraConfig) -> list[PeftTarget]:
    """Every adapter by PEFT's name. Raises ValueError where no Hugging Face family is this model, or PEFT's format has
    no place for a magnitude."""
    there = {part.ours: (name, part) for name, part in Names(model).in_memory().items()}
    ours = targets(model, lora)
    stacks = {target.module for target in ours if target.num_experts}
    found = []
    for target in ours:
        name, part = there[target.weight]
        module, _, parameter = name.rpartition(".")
        is_parameter = bool(target.num_experts) or ".moe.router." in target.weight
        if model.moe_layers and module.endswith(_FORMER_EXPERTS):
            is_parameter = True
        nested = ""
        if target.num_experts and target.module.replace("lora_gate_up", "lora_down") in stacks - {target.module}:
            nested = ".base_layer"
        prefix = f"base_model.model.{module}{nested}"
        if is_parameter and lora.use_dora:
            raise ConfigError(
                f"lora.use_dora=true: PEFT's format has {target.weight} of a model with experts in target_parameters, "
                "which have no magnitudes; merge the adapters (--merge), or name other modules"
            )
        found.append(PeftTarget(target, module, parameter if is_parameter else None, prefix, part))
    return found


def adapter_config(model: ModelConfig, lora: LoraConfig, base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json. `base`: name or folder of the model."""
    every = peft_targets(model, lora)
    modules = sorted({target.module.rpartition(".")[2] for target in every if target.parameter is None})
    names = {
        ".".join([*target.module.split(".")[3:], target.parameter]) for target in every if target.parameter is not None
    }
    return {
        "peft_type": "LORA",
        "peft_version": VERSION,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        # Which PEFT refuses beside target_parameters; it is of training alone.
        "lora_dropout": 0.0 if names else lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.use_dora,
        "target_modules": modules,
        "target_parameters": sorted(names) or None,
        "inference_mode": True,
        "init_lora_weights": True,
        **_WITHOUT,
    }


def write_adapter(
    folder: Path, model: ModelConfig, lora: LoraConfig, weights: dict[str, Tensor], base: str | None
) -> int:
    """Write both files into `folder`, weights by our names; returns the bytes of the weights.

    Raises ConfigError where a value is not finite.
    """
    found: dict[str, Tensor] = {}
    for target in peft_targets(model, lora):
        names = (f"{target.ours.module}.A", f"{target.ours.module}.B")
        for name in target.ours.shapes(lora):
            if not torch.isfinite(weights[name]).all():
                raise ConfigError(f"{name}: a value that is not finite")
        for key, tensor in zip("AB", target.to_theirs(*(weights[name] for name in names)), strict=True):
            found[f"{target.prefix}.lora_{key}.weight"] = tensor.contiguous()
        if lora.use_dora:
            found[f"{target.prefix}.{_MAGNITUDE}"] = weights[f"{target.ours.module}.magnitude"]
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(adapter_config(model, lora, base), indent=2) + "\n", encoding="utf-8")
    return sum(tensor.nbytes for tensor in found.values())


def read_adapter(folder: Path, model: ModelConfig, lora: LoraConfig) -> dict[str, Tensor]:
    """The weights of a PEFT adapter by our names, float32.

    Raises ConfigError for another adapter than `lora` says, and for tensors that are missing, of another shape or not
    finite, or that it has beyond.
    """
    said = f"lora.from_adapter={folder}"
    _same_adapter(folder, model, lora, said)
    problems: list[str] = []
    weights: dict[str, Tensor] = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            left = set(file.keys())
            for target in peft_targets(model, lora):
                names = [f"{target.prefix}.lora_{key}.weight" for key in "AB"]
                names += [f"{target.prefix}.{_MAGNITUDE}"] * lora.use_dora
                if missing := [name for name in names if name not in left]:
                    problems.append(f"{missing[0]}: missing")
                    continue
                left -= set(names)
                tensors = [file.get_tensor(name).float() for name in names]
                problems += _wrong_tensors(target, names, tensors, lora)
                if not problems:
                    both = target.to_ours(*tensors[:2])
                    weights |= dict(zip(target.ours.shapes(lora), (*both, *tensors[2:]), strict=True))
            problems += [f"{name}: not of this adapter" for name in sorted(left)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{said}: {WEIGHTS} cannot be read: {error}") from None
    except Exception as error:  # of safetensors, for a file that is cut short or none of its
        raise ConfigError(f"{said}: {WEIGHTS} cannot be read: {error}") from None
    if problems:
        raise ConfigError(f"{said}: {'; '.join(problems[:5])}{f'; and {len(problems) - 5} more' * (len(problems) > 5)}")
    return weights


def _wrong_tensors(target: PeftTarget, names: list[str], tensors: list[Tensor], lora: LoraConfig) -> Iterator[str]:
    a, b, *magnitude = target.ours.shapes(lora).values()
    wanted = [tuple(tensor.shape) for tensor in target.to_theirs(torch.empty(a), torch.empty(b))] + magnitude
    for name, tensor, shape in zip(names, tensors, wanted, strict=True):
        if tuple(tensor.shape) != shape:
            yield f"{name} is {list(tensor.shape)}, should be {list(shape)}"
        elif not torch.isfinite(tensor).all():
            yield f"{name}: a value that is not finite"


def _same_adapter(folder: Path, model: ModelConfig, lora: LoraConfig, said: str) -> None:
    try:
        found = json.loads((folder / CONFIG).read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{said}: {CONFIG} cannot be read: {error}") from None
    wanted = adapter_config(model, lora, None)
    keys = {"r": "lora.r", "lora_alpha": "lora.alpha", "use_rslora": "lora.rslora", "use_dora": "lora.use_dora"}
    for key, ours in keys.items():
        if found.get(key, False if key.startswith("use_") else None) != wanted[key]:
            raise ConfigError(f"{said}: {key} is {found.get(key)} there, {ours} is {wanted[key]}; set it so")
    for key in ("target_modules", "target_parameters"):
        there, here = found.get(key) or [], wanted[key] or []
        if not isinstance(there, list) or sorted(map(str, there)) != sorted(here):
            raise ConfigError(f"{said}: {key} is {there} there, by lora.target_modules {here}; name the same")
    for key, value in _WITHOUT.items():
        if (found.get(key) or None) != (value or None) and found.get(key) != value:
            raise ConfigError(f"{said}: {key}={found[key]} is not offered; allowed: {value}")
