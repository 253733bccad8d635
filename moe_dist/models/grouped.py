"""Rows sorted by expert times one matrix per expert, and the adapters of such stacks.

Shape suffixes: R rows, X width of a row, e experts held here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from moe_dist.models.noise import Sources, keep_mask

Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped_mm_takes(dtype: torch.dtype, sizes: tuple[int, ...]) -> bool:
    """Whether the kernel has this dtype, and strides of these sizes are whole multiples of 16 bytes."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and all(n * dtype.itemsize % 16 == 0 for n in sizes)


def multiply_rows(rows_RX: Tensor, weights: Tensor, rows_per_expert: Tensor) -> Tensor:
    """Row r of expert e times `weights` (e, X, Y): (R, X) -> (R, Y), by the kernel where it has these sizes."""
    if len(rows_RX) and grouped_mm_takes(weights.dtype, weights.shape[1:]):
        return grouped_mm(rows_RX, weights, offs=rows_per_expert.cumsum(0).to(torch.int32))
    return multiply_one_by_one(rows_RX, weights, rows_per_expert)


def multiply_one_by_one(rows_RX: Tensor, weights: Tensor, rows_per_expert: Tensor) -> Tensor:
    """The specification of `multiply_rows`; waits for the device. Without rows, gradients are zeros."""
    chunks = rows_RX.split(rows_per_expert.tolist())
    return torch.cat([x @ weight for x, weight in zip(chunks, weights.unbind(0), strict=True)])


class StackedLowRank(nn.Module):
    """The adapters of a stack of experts, one for each: scale * dropout(x) A_e B_e for rows of expert e.

    `A` (e, in, r), `B` (e, r, out). They are multiplied by rows one after the other: no expert's W + B A is ever made.
    """

    def __init__(self, num_experts: int, num_in: int, num_out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(num_experts, num_in, rank))
        self.B = nn.Parameter(torch.empty(num_experts, rank, num_out))
        self.scale, self.dropout = scale, dropout

    def forward(
        self,
        rows_RX: Tensor,
        rows_per_expert: Tensor,
        sources: Sources | None = None,
        held: Sequence[int] = (),
        multiply: Multiply = multiply_rows,
    ) -> Tensor:
        """(R, in) -> (R, out). `sources`: whose the rows are, needed for dropout, as are the global ids of the
        experts here, `held`."""
        if self.training and self.dropout:
            assert sources is not None
            kept = keep_mask(sources, held, rows_RX, self.dropout)
            rows_RX = rows_RX * (kept / (1.0 - self.dropout))
        a, b = self.A.to(rows_RX.dtype), self.B.to(rows_RX.dtype)
        return multiply(multiply(rows_RX, a, rows_per_expert) * self.scale, b, rows_per_expert)
