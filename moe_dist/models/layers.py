"""Dense parts of the transformer: RMSNorm, rotary positions, SwiGLU.

Shape suffixes: B batch, S sequence, D hidden, F intermediate, H heads, C head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.models.precision import full, full_dtype


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. Input and output (..., D), same dtype.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(full(x), (x.shape[-1],), None, self.eps).to(x.dtype)
        return normed * self.weight.to(x.dtype)


def rotary_table(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each (..., S, C) float32, for positions (..., S) int.

    Su et al. 2021, https://arxiv.org/abs/2104.09864; halves are rotated as in Hugging Face's Llama family.
    """
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=full_dtype()) / head_size
    angles = full(positions)[..., None] * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHSC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (c, c + C/2) of a head by its position's angle; cos and sin are (B or 1, 1, S, C)."""
    left, right = x_BHSC.chunk(2, dim=-1)
    return x_BHSC * cos.to(x_BHSC.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x_BHSC.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): (..., D) -> (..., D). Shazeer 2020, https://arxiv.org/abs/2002.05202."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
