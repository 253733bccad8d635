"""Rotary positions, plain and stretched. Shape suffixes: B batch, S sequence, H heads, C head width, P pairs turned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_dist.config import ModelConfig
from moe_dist.config.sections.rope import YARN_BOUNDS
from moe_dist.models.precision import full, full_dtype


def rotary_table(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each (..., S, 2P) float32, for positions (..., S) int.

    Su et al. 2021, https://arxiv.org/abs/2104.09864; P = `config.rotary_size` / 2 pairs of a head are turned, and
    halves are rotated as in Hugging Face's Llama family. `config.rope_scaling` as `transformers` computes it.
    """
    size = config.rotary_size
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=full_dtype()) / size
    frequencies, factor = 1.0 / config.rope_theta**exponents, 1.0
    if config.rope_scaling is not None:
        frequencies, factor = _SCALINGS[str(config.rope_scaling["rope_type"])](frequencies, positions, config)
    angles = full(positions)[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    if factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def rotate(x_BHSC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (c, c + P) of a head by its position's angle; cos and sin are (B or 1, 1, S, 2P).

    What lies past the first 2P elements stays.
    """
    size = cos.shape[-1]
    if size < x_BHSC.shape[-1]:
        return torch.cat((rotate(x_BHSC[..., :size], cos, sin), x_BHSC[..., size:]), dim=-1)
    left, right = x_BHSC.chunk(2, dim=-1)
    return x_BHSC * cos.to(x_BHSC.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x_BHSC.dtype)


def rotate_neighbours(x_BHSC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotate`, of pairs (2p, 2p + 1); they come out as (p, p + P), for queries and keys alike."""
    return rotate(torch.cat((x_BHSC[..., ::2], x_BHSC[..., 1::2]), dim=-1), cos, sin)


def score_factor(config: ModelConfig) -> float:
    """By what multi-head latent attention multiplies its scores besides 1 / sqrt(width): YaRN's mscale_all_dim."""
    scaling = config.rope_scaling or {}
    power = _number(scaling, "mscale_all_dim", 0.0)
    return _magnitude(_number(scaling, "factor", 1.0), power) ** 2 if power else 1.0


Scaled = tuple[Tensor, float]
"""Frequencies (P,), or (..., 1, P) where they depend on positions; and a factor on cosines and sines."""


def _linear(frequencies: Tensor, positions: Tensor, config: ModelConfig) -> Scaled:
    return frequencies / _number(config.rope_scaling, "factor"), 1.0


def _dynamic(frequencies: Tensor, positions: Tensor, config: ModelConfig) -> Scaled:
    """The base grows with sequences past max_position_embeddings, which are refused here."""
    return frequencies, 1.0


def _yarn(frequencies: Tensor, positions: Tensor, config: ModelConfig) -> Scaled:
    """Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3.2; its temperature as a factor on cosines."""
    scaling, size = config.rope_scaling or {}, config.rotary_size
    factor, length = _number(scaling, "factor"), _number(scaling, "original_max_position_embeddings")

    def pair_with(rotations: float) -> float:
        """The pair, not a whole number, that turns so often over the length of pretraining."""
        return size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = (pair_with(_number(scaling, key, default)) for key, default in YARN_BOUNDS.items())
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = torch.arange(size // 2, device=frequencies.device, dtype=frequencies.dtype) - low
    slowed = (ramp / (high - low if high != low else 0.001)).clamp(0, 1)
    mscale, all_dim = _number(scaling, "mscale", 0.0), _number(scaling, "mscale_all_dim", 0.0)
    magnitude = _magnitude(factor, mscale) / _magnitude(factor, all_dim) if mscale and all_dim else _magnitude(factor)
    mixed = frequencies / factor * slowed + frequencies * (1 - slowed)
    return mixed, _number(scaling, "attention_factor", magnitude)


def _llama3(frequencies: Tensor, positions: Tensor, config: ModelConfig) -> Scaled:
    """Llama 3.1: slow pairs are stretched, fast ones are not, between them it blends (Grattafiori et al. 2024)."""
    scaling = config.rope_scaling or {}
    factor, length = _number(scaling, "factor"), _number(scaling, "original_max_position_embeddings")
    slow, fast = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    waves = 2 * math.pi / frequencies
    kept = ((length / waves - slow) / (fast - slow)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies, 1.0


def _longrope(frequencies: Tensor, positions: Tensor, config: ModelConfig) -> Scaled:
    """Ding et al. 2024, https://arxiv.org/abs/2402.13753. Of a row that has a position past the length of pretraining
    every position takes the long factors, whatever else is in its batch."""
    scaling = config.rope_scaling or {}
    length = _number(scaling, "original_max_position_embeddings")
    like: dict[str, Any] = {"device": frequencies.device, "dtype": frequencies.dtype}
    long, short = (torch.tensor(scaling[key], **like) for key in ("long_factor", "short_factor"))
    is_long = (positions.amax(-1) >= length)[..., None, None]
    factor = _number(scaling, "factor", config.max_position_embeddings / length)
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    return frequencies / torch.where(is_long, long, short), _number(scaling, "attention_factor", magnitude)


def _magnitude(factor: float, power: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * power * math.log(factor) + 1.0


def _number(scaling: Any, key: str, default: float | None = None) -> float:
    value = (scaling or {}).get(key)
    assert value is not None or default is not None, key  # `check_rope_scaling` has seen to it
    return float(default if value is None else value)  # type: ignore[arg-type]


_SCALINGS: dict[str, Callable[[Tensor, Tensor, ModelConfig], Scaled]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
