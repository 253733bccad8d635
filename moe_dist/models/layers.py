"""Dense parts of the transformer: RMSNorm and the gated unit. Shape suffixes: D hidden, F intermediate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.models.precision import full, full_dtype
from moe_dist.models.quantized import QuantizedWeight, TimesQuantized


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

    def beside(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """(..., in) -> (..., out): the map of `weight` (out, in) with this adapter."""
        return self.add_to(F.linear(x, weight, bias), x)

    def widen(self, weight: Tensor) -> Tensor:
        """(out, in) -> (out, in + r), for x with `scale * narrow(x)` behind it: the map with this adapter."""
        return torch.cat((weight, self.B.to(weight.dtype)), dim=1)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """`out` (..., out) plus `forward` of x, without a second tensor of its size on the way."""
        narrow = (self.narrow(x) * self.scale).flatten(0, -2)
        return torch.addmm(out.flatten(0, -2), narrow, self.B.to(x.dtype).t()).view_as(out)

    def narrow(self, x: Tensor) -> Tensor:
        """A dropout(x), (..., r)."""
        return F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))


class DecomposedLowRank(LowRank):
    """DoRA: W + scale * B A, and every row of it brought to a length that is trained. Liu et al. 2024.

    `magnitude` (out,): that length less the row's of W, so that zeros, with zeros in B, change nothing, whatever W is
    rounded to. No gradient goes through the row's own length (section 4.3), https://arxiv.org/abs/2402.09353.
    """

    def __init__(self, num_in: int, num_out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__(num_in, num_out, rank, scale, dropout)
        self.magnitude = nn.Parameter(torch.empty(num_out))

    def beside(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). The bias is not scaled."""
        out = self.add_to(F.linear(x, weight), x)
        out = (out * self.factor(weight)).to(out.dtype)
        return out if bias is None else out + bias.to(out.dtype)

    def widen(self, weight: Tensor) -> Tensor:
        """As of the base class, with rows scaled."""
        return (super().widen(weight) * self.factor(weight).unsqueeze(1)).to(weight.dtype)

    def factor(self, weight: Tensor) -> Tensor:
        """(out,) in full precision: what each row of W + scale * B A is multiplied by."""
        own, now = self.lengths(weight)
        return (own + full(self.magnitude)) / now

    @torch.no_grad()
    def lengths(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(out,) each: the length of every row of W, and of W + scale * B A, which is not made."""
        with torch.autocast(weight.device.type, enabled=False):
            squared = torch.linalg.vector_norm(weight, dim=1, dtype=full_dtype()).square()
            a, b = full(self.A), full(self.B) * self.scale
            crossed = (full(F.linear(weight, a.to(weight.dtype))) * b).sum(1)
            added = ((b @ (a @ a.t())) * b).sum(1)
            own, now = squared.sqrt(), (squared + 2 * crossed + added).clamp_(min=0).sqrt_()
        return own, now.clamp_(min=torch.finfo(now.dtype).tiny)  # a row of zeros stays one


class Linear(nn.Linear):
    """`nn.Linear` with a place for an adapter, `lora`, which adds to its result. The weight may be in few bits."""

    lora: LowRank | None

    def __init__(self, num_in: int, num_out: int, bias: bool = True) -> None:
        super().__init__(num_in, num_out, bias)
        self.lora = None

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, QuantizedWeight):
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            out = TimesQuantized.apply(x := x.to(dtype), self.weight, F.linear)
            out = out if self.bias is None else out + self.bias.to(dtype)
            return out if self.lora is None else self.lora.add_to(out, x)
        return super().forward(x) if self.lora is None else self.lora.beside(self.weight, self.bias, x)


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
