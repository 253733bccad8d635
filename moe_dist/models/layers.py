"""Dense parts of the transformer: RMSNorm and the gated unit. Shape suffixes: D hidden, F intermediate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.models.precision import full


class LowRank(nn.Module):
    """The adapter of one linear map: scale * B A dropout(x), (..., in) -> (..., out). Hu et al. 2021.

    `A` (r, in), `B` (out, r), https://arxiv.org/abs/2106.09685.
    """

    def __init__(self, num_in: int, num_out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(rank, num_in)), nn.Parameter(torch.empty(num_out, rank))
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.narrow(x) * self.scale, self.B.to(x.dtype))

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """`out` (..., out) plus `forward` of x, without a second tensor of its size on the way."""
        narrow = (self.narrow(x) * self.scale).flatten(0, -2)
        return torch.addmm(out.flatten(0, -2), narrow, self.B.to(x.dtype).t()).view_as(out)

    def narrow(self, x: Tensor) -> Tensor:
        """A dropout(x), (..., r)."""
        return F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))


class Linear(nn.Linear):
    """`nn.Linear` with a place for an adapter, `lora`, which adds to what the map gives."""

    lora: LowRank | None

    def __init__(self, num_in: int, num_out: int, bias: bool = True) -> None:
        super().__init__(num_in, num_out, bias)
        self.lora = None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.lora is None else self.lora.add_to(out, x)


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


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""Values of `model.hidden_act`."""


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): (..., D) -> (..., D). Shazeer 2020, https://arxiv.org/abs/2002.05202.

    `activation` in the place of silu makes it GeGLU.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "silu") -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
