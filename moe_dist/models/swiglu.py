"""SwiGLU of many experts over rows sorted by expert, forward and backward.

Shape suffixes: R rows, D hidden, F intermediate, e experts held here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from moe_dist.models.float8 import multiply_in_float8
from moe_dist.models.grouped import grouped_mm_takes
from moe_dist.models.layers import ACTIVATIONS

Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows (R, X), weights (e, X, Y), where each expert's rows end (e,) int32) -> (R, Y)."""


def loop_swiglu(
    rows_RD: Tensor, w_gate_up: Tensor, w_down: Tensor, rows_per_expert: Tensor, activation: str = "silu"
) -> Tensor:
    """SwiGLU of every expert for its rows, (R, D) -> (R, D), in any dtype and of any sizes. Waits for the device."""
    # unbind once: indexing weight[e] in the loop would build a full-size zero gradient per expert.
    weights = zip(w_gate_up.unbind(0), w_down.unbind(0), strict=True)
    chunks = rows_RD.split(rows_per_expert.tolist())
    both = zip(chunks, weights, strict=True)
    return torch.cat([swiglu(x @ gate_up, activation) @ down for x, (gate_up, down) in both])


def swiglu(gate_up: Tensor, activation: str = "silu", kernels: str = "torch") -> Tensor:
    """silu(first half) * second half of the last dimension; with Triton's `kernels` of a matrix."""
    if kernels == "triton":
        from moe_dist.models import triton_kernels  # not installed everywhere

        return triton_kernels.swiglu(gate_up, activation)
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def swiglu_backward(
    grad_hidden: Tensor, gate_up: Tensor, hidden: Tensor, grad_gate_up: Tensor, activation: str, kernels: str
) -> None:
    """Write swiglu(gate_up) to `hidden` and its gradient to `grad_gate_up`; `grad_hidden` is used up."""
    if kernels == "triton":
        from moe_dist.models import triton_kernels

        triton_kernels.swiglu_backward(grad_hidden, gate_up, hidden, grad_gate_up, activation)
        return
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    forward, backward, how = _IN_PLACE[activation]
    forward(gate, **how, out=hidden)
    torch.mul(grad_hidden, hidden, out=grad_up)
    hidden.mul_(up)
    backward(grad_hidden.mul_(up), gate, **how, grad_input=grad_gate)


_aten = torch.ops.aten
# Activation -> (into a tensor that is there, its gradient likewise, how).
_IN_PLACE: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "silu": (_aten.silu.out, _aten.silu_backward.grad_input, {}),
    "gelu": (_aten.gelu.out, _aten.gelu_backward.grad_input, {"approximate": "none"}),
    "gelu_tanh": (_aten.gelu.out, _aten.gelu_backward.grad_input, {"approximate": "tanh"}),
}


def _multiply(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return grouped_mm(rows, weights, offs=ends)


_MULTIPLY: dict[str, Multiply] = {"compute": _multiply, "fp8": multiply_in_float8}
"""Rows times weights, by `train.expert_precision`."""


class GroupedSwiGLU(torch.autograd.Function):
    """All experts in two grouped matmuls, and backward in four, without a host synchronisation.

    Those of rows with weights are by `precision` (`train.expert_precision`), gradients of weights as they come.
    Of the activations only gate_up is kept; the hidden one is made again in backward. More rows than `chunk_rows` come
    in chunks of a quarter as many, and their gate_up is made again too: there are three tensors of all rows by then
    which there is no way around, and what is held beside them makes room. Without a row nothing is called, and
    gradients, zeros, come in the same order: an engine may reduce them as they come, on all ranks together.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        offsets: Tensor,
        activation: str,
        kernels: str,
        chunk_rows: int,
        precision: str,
    ) -> Tensor:
        ctx.unit, ctx.chunk_rows, ctx.multiply = (activation, kernels), chunk_rows, _MULTIPLY[precision]
        if not len(rows_RD):
            ctx.save_for_backward(rows_RD, None, w_gate_up, w_down, offsets)
            return rows_RD.new_empty(rows_RD.shape)
        gate_up, out = None, _Rows(len(rows_RD))
        for (rows,), ends in _chunks(chunk_rows, offsets, rows_RD):
            gate_up = ctx.multiply(rows, w_gate_up, ends)
            out.append(ctx.multiply(swiglu(gate_up, activation, kernels), w_down, ends))
            gate_up = gate_up if len(rows) == len(rows_RD) else None
        ctx.save_for_backward(rows_RD, gate_up, w_gate_up, w_down, offsets)
        return out.whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, gate_up, w_gate_up, w_down, offsets = ctx.saved_tensors
        want_rows, want_up, want_down, *_ = ctx.needs_input_grad
        if not len(rows_RD):
            wanted = zip((rows_RD, w_gate_up, w_down), ctx.needs_input_grad, strict=False)
            d_rows, d_up, d_down = (torch.zeros_like(like) if want else None for like, want in wanted)
            return d_rows, d_up, d_down, *_NOT_WANTED
        grad_RD = grad_RD.contiguous()  # the kernel refuses expanded ones, as of a sum
        out, d_up, d_down = _Rows(len(rows_RD)), None, None
        for (rows, grad), ends in _chunks(ctx.chunk_rows, offsets, rows_RD, grad_RD):
            grad_gate_up, hidden = _unit_gradient(ctx, rows, grad, gate_up, w_gate_up, w_down, ends)
            d_down = _added(d_down, _weight_gradient(hidden, grad, ends)) if want_down else None
            del hidden
            if want_rows:
                out.append(ctx.multiply(grad_gate_up, w_gate_up.transpose(1, 2), ends))
            d_up = _added(d_up, _weight_gradient(rows, grad_gate_up, ends)) if want_up else None
            del grad_gate_up  # or it would be there beside the next chunk's
        return out.whole if want_rows else None, d_up, d_down, *_NOT_WANTED


_NOT_WANTED = (None,) * 5
"""Gradients of what `forward` takes behind the weights."""


def _unit_gradient(
    ctx: Any, rows: Tensor, grad: Tensor, gate_up: Tensor | None, w_gate_up: Tensor, w_down: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up (R, 2F), which is computed where it was not kept, and the hidden activation (R, F)."""
    if gate_up is None:
        gate_up = ctx.multiply(rows, w_gate_up, ends)
    grad_hidden = ctx.multiply(grad, w_down.transpose(1, 2), ends)
    hidden, grad_gate_up = torch.empty_like(grad_hidden), torch.empty_like(gate_up)
    swiglu_backward(grad_hidden, gate_up, hidden, grad_gate_up, *ctx.unit)
    return grad_gate_up, hidden


def _weight_gradient(rows_RX: Tensor, grad_RY: Tensor, ends: Tensor) -> Tensor:
    """(e, X, Y): of each expert the sum over its rows of one times the other."""
    if grouped_mm_takes(rows_RX.dtype, (rows_RX.shape[1], grad_RY.shape[1])):
        return grouped_mm(rows_RX.t(), grad_RY, offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.stack([x.t() @ grad for x, grad in zip(rows_RX.split(sizes), grad_RY.split(sizes), strict=True)])


def _chunks(chunk_rows: int, offsets: Tensor, *tensors: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """`tensors` (R, ...) whole, or if they have more than `chunk_rows` rows slices of a quarter as many, and where
    every expert's rows end in them."""
    num_rows = len(tensors[0])
    if not chunk_rows or num_rows <= chunk_rows:
        yield list(tensors), offsets
        return
    for start in range(0, num_rows, size := -(-chunk_rows // 4)):
        parts = [tensor[start : start + size] for tensor in tensors]
        yield parts, (offsets - start).clamp(0, len(parts[0]))


class _Rows:
    """A tensor (R, ...) put together from chunks of its rows; a single one is taken as it is."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows, self.filled = num_rows, 0

    def append(self, part: Tensor) -> None:
        if len(part) == self.num_rows:
            self.whole = part
            return
        if not self.filled:
            self.whole = part.new_empty(self.num_rows, *part.shape[1:])
        self.whole[self.filled : self.filled + len(part)] = part
        self.filled += len(part)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
