"""Rows to experts and back, and gated units, as Triton kernels (`train.kernels: triton`).

Each equals the plain path beside it: `permute.py`, and `swiglu` of `experts.py`. Numbers are read in their own dtype,
computed in float32 (float64 where they are that) and rounded once. Sums have a fixed order, and nothing is added by
several programs: results are the same bit for bit in every run. With TRITON_INTERPRET=1 in the environment when this
module is imported, Python computes them on a CPU: for that, kernels use no function of Triton that is jitted itself.

Shape suffixes: T tokens, K top-k, D hidden, R rows, F intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_LARGEST_BLOCK = 1024
"""Numbers that a program has at once."""


def gather(x_TD: Tensor, pair_of_row: Tensor, top_k: int) -> Tensor:
    """(T, D) -> (R, D): the token of each row, which is pair t * K + k of `pair_of_row` (R,) int64."""
    x_TD, (num_rows, width) = x_TD.contiguous(), (pair_of_row.shape[0], x_TD.shape[1])
    out = x_TD.new_empty(num_rows, width)
    if out.numel():
        block = _block(width)
        _gather[_grid(num_rows, width, block)](x_TD, pair_of_row, out, width, TOP_K=top_k, BLOCK=block)
    return out


def sum_by_token(rows_RD: Tensor, row_of_pair: Tensor, weights_TK: Tensor | None) -> Tensor:
    """(R, D) -> (T, D): each token's rows over k in order, times its weights where there are any.

    `row_of_pair` (T, K) int64: R and above for pairs without a row. Weights are rounded to the dtype of rows.
    """
    rows_RD, (num_tokens, top_k), width = rows_RD.contiguous(), row_of_pair.shape, rows_RD.shape[1]
    out = rows_RD.new_empty(num_tokens, width)
    if out.numel():
        block = _block(width)
        weights = None if weights_TK is None else weights_TK.contiguous()
        _sum_by_token[_grid(num_tokens, width, block)](
            *(rows_RD, row_of_pair.contiguous(), weights, out, rows_RD.shape[0], width),
            TOP_K=top_k,
            IS_WEIGHTED=weights is not None,
            FULL=_full(rows_RD),
            BLOCK=block,
        )
    return out


def weighted_gradients(
    grad_TD: Tensor, rows_RD: Tensor, weights_TK: Tensor, pair_of_row: Tensor, want_rows: bool, want_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `sum_by_token` with weights: of rows (R, D), of weights (T, K); None of what is not wanted."""
    grad_TD, weights_TK = grad_TD.contiguous(), weights_TK.contiguous()
    (num_rows, width), top_k = rows_RD.shape, weights_TK.shape[1]
    grad_rows = grad_TD.new_empty(num_rows, width) if want_rows else None
    grad_weights = torch.zeros_like(weights_TK) if want_weights else None
    if num_rows:
        _weighted_gradients[(num_rows,)](
            *(grad_TD, rows_RD.contiguous(), weights_TK, pair_of_row, grad_rows, grad_weights, width),
            TOP_K=top_k,
            WANT_ROWS=want_rows,
            WANT_WEIGHTS=want_weights,
            FULL=_full(grad_TD),
            BLOCK=_block(width),
        )
    return grad_rows, grad_weights


def swiglu(gate_up: Tensor, activation: str) -> Tensor:
    """(R, 2F), gate first -> (R, F). `activation`: a name of `layers.ACTIVATIONS`. Differentiable."""
    return _SwiGLU.apply(gate_up, activation)


def swiglu_backward(
    grad_hidden: Tensor, gate_up: Tensor, hidden: Tensor | None, grad_gate_up: Tensor, activation: str
) -> None:
    """Write swiglu(gate_up) to `hidden`, where that is wanted, and its gradient to `grad_gate_up`."""
    num_rows, width = grad_hidden.shape
    if grad_hidden.numel():
        block = _block(width)
        _swiglu_backward[_grid(num_rows, width, block)](
            *(grad_hidden.contiguous(), gate_up.contiguous(), hidden, grad_gate_up, width),
            WANT_HIDDEN=hidden is not None,
            ACTIVATION=activation,
            FULL=_full(gate_up),
            BLOCK=block,
        )


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(num_rows, width)
        if out.numel():
            block = _block(width)
            _swiglu[_grid(num_rows, width, block)](
                gate_up, out, width, ACTIVATION=activation, FULL=_full(gate_up), BLOCK=block
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        grad_gate_up = torch.empty_like(gate_up)
        swiglu_backward(grad_RF, gate_up, None, grad_gate_up, ctx.activation)
        return grad_gate_up, None


def _block(width: int) -> int:
    return min(1 << (width - 1).bit_length(), _LARGEST_BLOCK)


def _grid(num_rows: int, width: int, block: int) -> tuple[int, int]:
    """Programs: one for each row and block of it."""
    return num_rows, -(-width // block)


def _full(tensor: Tensor) -> Any:
    """What numbers of this dtype are computed in."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


# Offsets are int64: rows times their width may be more than 2^31.


@triton.jit
def _gather(
    x: tl.tensor, pair_of_row: tl.tensor, out: tl.tensor, width: tl.tensor, TOP_K: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(pair_of_row + row) // TOP_K
    numbers = tl.load(x + token * width + column, mask=column < width)
    tl.store(out + row * width + column, numbers, mask=column < width)


@triton.jit
def _sum_by_token(
    rows: tl.tensor,
    row_of_pair: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    TOP_K: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0.0, FULL)
    for k in range(TOP_K):
        pair = token * TOP_K + k
        row = tl.load(row_of_pair + pair)
        there = row < num_rows
        part = tl.load(rows + row * width + column, mask=(column < width) & there, other=0.0).to(FULL)
        if IS_WEIGHTED:
            # Of a pair without a row the weight may be anything, and 0 * inf is no 0.
            part *= tl.load(weights + pair, mask=there, other=0.0).to(rows.dtype.element_ty).to(FULL)
        total += part
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _weighted_gradients(
    grad: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    pair_of_row: tl.tensor,
    grad_rows: tl.tensor,
    grad_weights: tl.tensor,
    width: tl.tensor,
    TOP_K: tl.constexpr,
    WANT_ROWS: tl.constexpr,
    WANT_WEIGHTS: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(pair_of_row + row)
    token = pair // TOP_K
    weight = tl.load(weights + pair).to(grad.dtype.element_ty).to(FULL)
    products = tl.full((BLOCK,), 0.0, FULL)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        numbers = tl.load(grad + token * width + column, mask=column < width, other=0.0).to(FULL)
        if WANT_ROWS:
            mine = (numbers * weight).to(grad_rows.dtype.element_ty)
            tl.store(grad_rows + row * width + column, mine, mask=column < width)
        if WANT_WEIGHTS:
            products += numbers * tl.load(rows + row * width + column, mask=column < width, other=0.0).to(FULL)
    if WANT_WEIGHTS:
        total = tl.reduce(products, 0, _add)
        tl.store(grad_weights + pair, total.to(grad_weights.dtype.element_ty))


@triton.jit
def _add(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    return left + right


@triton.jit
def _swiglu(
    gate_up: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    ACTIVATION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = gate_up + row * 2 * width + column
    gate = tl.load(first, mask=column < width, other=0.0).to(FULL)
    up = tl.load(first + width, mask=column < width, other=0.0).to(FULL)
    hidden = gate * _share(gate, ACTIVATION) * up
    tl.store(out + row * width + column, hidden.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _swiglu_backward(
    grad_hidden: tl.tensor,
    gate_up: tl.tensor,
    hidden: tl.tensor,
    grad_gate_up: tl.tensor,
    width: tl.tensor,
    WANT_HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = row * 2 * width + column
    gate = tl.load(gate_up + first, mask=column < width, other=0.0).to(FULL)
    up = tl.load(gate_up + first + width, mask=column < width, other=0.0).to(FULL)
    grad = tl.load(grad_hidden + row * width + column, mask=column < width, other=0.0).to(FULL)
    share = _share(gate, ACTIVATION)
    activated = gate * share
    if WANT_HIDDEN:
        tl.store(hidden + row * width + column, (activated * up).to(hidden.dtype.element_ty), mask=column < width)
    d_gate = (grad * up * (share + gate * _slope(gate, share, ACTIVATION))).to(grad_gate_up.dtype.element_ty)
    d_up = (grad * activated).to(grad_gate_up.dtype.element_ty)
    tl.store(grad_gate_up + first, d_gate, mask=column < width)
    tl.store(grad_gate_up + first + width, d_up, mask=column < width)


@triton.jit
def _share(gate: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """What an activation lets through of `gate`, which it multiplies: 0 to 1."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        share = _sigmoid(gate * (1.5957691216057308 + 0.07135481627260025 * gate * gate))
    else:
        share = _sigmoid(gate)
    return share


@triton.jit
def _slope(gate: tl.tensor, share: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The derivative of `_share` by `gate`."""
    if ACTIVATION == "gelu":
        slope = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    elif ACTIVATION == "gelu_tanh":
        slope = share * (1.0 - share) * (1.5957691216057308 + 0.21406444881780073 * gate * gate)
    else:
        slope = share * (1.0 - share)
    return slope


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    return 1.0 / (1.0 + tl.exp(-x))
