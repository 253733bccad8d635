"""Frozen experts with their adapters as one step: what autograd would keep for each part of it is not kept.

Shape suffixes: R rows, D hidden, F intermediate, r rank of an adapter, e experts held here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from moe_dist.models.quantized import QuantizedWeight

Forward = Callable[[Tensor], Tensor]
"""(R, 2F) -> (R, F)."""
Backward = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Gradient of (R, F), the (R, 2F) it is of; into the last two go the (R, F) itself and the gradient of (R, 2F)."""


def _whole(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return weight.whole(dtype) if isinstance(weight, QuantizedWeight) else weight


class AdaptedSwiGLU(torch.autograd.Function):
    """unit(x W_gate_up + s x A B) W_down + s h A' B', either adapter or both, or neither (None: there is none).

    Of the activations x, (R, 2F) and what is r wide are kept; (R, F) is made again in backward, and so are weights that
    are in few bits. Frozen weights have no gradient. `rows_RD` must have rows, and sizes that the grouped kernel takes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        w_gate_up: Tensor | QuantizedWeight,
        w_down: Tensor | QuantizedWeight,
        a_up: Tensor | None,
        b_up: Tensor | None,
        a_down: Tensor | None,
        b_down: Tensor | None,
        offsets: Tensor,
        scale: float,
        unit: Forward,
        unit_backward: Backward,
    ) -> Tensor:
        narrow_up = narrow_down = None
        gate_up = grouped_mm(rows_RD, _whole(w_gate_up, rows_RD.dtype), offs=offsets)
        if a_up is not None and b_up is not None:
            narrow_up = grouped_mm(rows_RD, a_up, offs=offsets).mul_(scale)
            gate_up.add_(grouped_mm(narrow_up, b_up, offs=offsets))
        hidden = unit(gate_up)
        out = grouped_mm(hidden, _whole(w_down, rows_RD.dtype), offs=offsets)
        if a_down is not None and b_down is not None:
            narrow_down = grouped_mm(hidden, a_down, offs=offsets).mul_(scale)
            out.add_(grouped_mm(narrow_down, b_down, offs=offsets))
        kept_RD = rows_RD if narrow_up is not None else None
        ctx.in_few_bits = [w if isinstance(w, QuantizedWeight) else None for w in (w_gate_up, w_down)]
        weights = [None if isinstance(w, QuantizedWeight) else w for w in (w_gate_up, w_down)]
        ctx.save_for_backward(kept_RD, gate_up, narrow_up, narrow_down, offsets, *weights, a_up, b_up, a_down, b_down)
        ctx.scale, ctx.unit_backward = scale, unit_backward
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, gate_up, narrow_up, narrow_down, offsets, *weights = ctx.saved_tensors
        w_gate_up, w_down, a_up, b_up, a_down, b_down = weights
        w_gate_up, w_down = ctx.in_few_bits[0] or w_gate_up, ctx.in_few_bits[1] or w_down
        want_rows, _, _, want_a_up, want_b_up, want_a_down, want_b_down, *_ = ctx.needs_input_grad

        def times(left: Tensor, right: Tensor) -> Tensor:
            return grouped_mm(left, right, offs=offsets)

        d_a_up = d_b_up = d_a_down = d_b_down = grad_narrow = None
        grad_RD = grad_RD.contiguous()  # the kernel refuses expanded ones, as of a sum
        grad_hidden = times(grad_RD, _whole(w_down, grad_RD.dtype).transpose(1, 2))
        if narrow_down is not None:
            grad_narrow = times(grad_RD, b_down.transpose(1, 2)).mul_(ctx.scale)
            grad_hidden.add_(times(grad_narrow, a_down.transpose(1, 2)))
            d_b_down = times(narrow_down.t(), grad_RD) if want_b_down else None
        hidden, grad_gate_up = torch.empty_like(grad_hidden), torch.empty_like(gate_up)
        ctx.unit_backward(grad_hidden, gate_up, hidden, grad_gate_up)
        if grad_narrow is not None and want_a_down:
            d_a_down = times(hidden.t(), grad_narrow)
        del hidden, grad_hidden
        d_rows = times(grad_gate_up, _whole(w_gate_up, grad_RD.dtype).transpose(1, 2)) if want_rows else None
        if narrow_up is not None:
            grad_narrow = times(grad_gate_up, b_up.transpose(1, 2)).mul_(ctx.scale)
            d_b_up = times(narrow_up.t(), grad_gate_up) if want_b_up else None
            d_a_up = times(rows_RD.t(), grad_narrow) if want_a_up else None
            if d_rows is not None:
                d_rows.add_(times(grad_narrow, a_up.transpose(1, 2)))
        return d_rows, None, None, d_a_up, d_b_up, d_a_down, d_b_down, None, None, None, None
