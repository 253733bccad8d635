"""Rows of experts times their weights with operands in float8 (`train.expert_precision: fp8`), an experiment.

A row of activations or gradients is rounded to float8_e4m3fn by a scale of its own, a weight by one for each column,
which is what one output is made of: the largest number along what a product sums becomes the largest of float8. Every
row is rounded for itself, whichever others come with it, so every layout computes the same. Where rows are summed over,
in gradients of weights, scales would have to be of many rows, which layouts share out: those products stay as they are.

What is kept for backward is what is kept without: unrounded rows, which gradients of weights need. A product holds the
codes of both operands for its time, a byte a number. Where it is emulated it holds them in float32 too: four more bytes
for each number of its weights, all experts of a layer at once.

Shape suffixes: R rows, X width of a row, Y of an output, e experts held here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType, scaled_grouped_mm  # type: ignore[attr-defined]

from moe_dist.models.grouped import multiply_rows
from moe_dist.versions import built_for_rocm

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448."""


class Float8(NamedTuple):
    """Numbers as codes, float8_e4m3fn, and `scale`, by which they are to be multiplied."""

    codes: Tensor
    scale: Tensor

    def whole(self) -> Tensor:
        """The numbers as they are after rounding, in the dtype of `scale`."""
        return self.codes.to(self.scale.dtype) * self.scale


def rounded(numbers: Tensor, summed: int) -> Float8:
    """`numbers`, with a scale for all that a product sums up along dimension `summed`, in which `scale` has size 1.

    Scales are float32, of float64 numbers float64: the largest number / 448, and above zero where all are zeros. One
    that is not finite makes all that share its scale NaN.
    """
    wide = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
    scale = (wide.abs().amax(summed, keepdim=True) / LARGEST).clamp_min(torch.finfo(wide.dtype).tiny)
    return Float8((wide / scale).to(torch.float8_e4m3fn), scale)


def multiply_in_float8(rows_RX: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Row r of expert e times `weights` (e, X, Y), both rounded: (R, X) -> (R, Y). `ends` (e,) int32: where the rows of
    each expert end. Products are summed in float32 (float64 of float64), and the sum is rounded to the dtype of rows.
    """
    rows, stack = rounded(rows_RX, 1), rounded(weights, 1)
    if kernel_takes(rows_RX, weights):
        return _by_kernel(rows, stack, ends)
    rows_per_expert = ends.diff(prepend=ends.new_zeros(1))
    with torch.autocast(rows_RX.device.type, enabled=False):  # it would round what is whole
        return multiply_rows(rows.whole(), stack.whole(), rows_per_expert).to(rows_RX.dtype)


def kernel_takes(rows_RX: Tensor, weights: Tensor) -> bool:
    """Whether torch has a kernel for float8 with scales by row: bfloat16 out, on SM 90 alone, of multiples of 16."""
    if not rows_RX.is_cuda or built_for_rocm() or rows_RX.dtype != torch.bfloat16:
        return False
    sizes_fit = all(size % 16 == 0 for size in weights.shape[1:])
    return sizes_fit and torch.cuda.get_device_capability(rows_RX.device) == (9, 0)


def _by_kernel(rows: Float8, stack: Float8, ends: Tensor) -> Tensor:
    # It wants weights column by column, which those of backward are already.
    columns = stack.codes.transpose(1, 2).contiguous().transpose(1, 2)
    by_row, plain = ScalingType.RowWise, SwizzleType.NO_SWIZZLE
    scales = rows.scale.flatten(), stack.scale.flatten(1).contiguous()
    return scaled_grouped_mm(rows.codes, columns, scales[0], by_row, scales[1], by_row, plain, plain, offs=ends)
