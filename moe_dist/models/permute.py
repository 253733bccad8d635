"""Tokens to rows sorted by expert, and back, with backward passes that are gathers in a fixed order.

A *pair* is one (token, chosen expert): pair p = t * K + k. A pair whose expert id is E (padding, or no place
left) has no row. Plain indexing would do the same sums by scatter-add, in random order on a GPU.

Shape suffixes: T tokens, K top-k, P = T * K pairs, R rows (pairs that are computed), D hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.models.precision import full_dtype

_ROWS_IN_CACHE = 512


@dataclass(frozen=True)
class Permutation:
    """Where every pair went. `pair_of_row` (R,); `row_of_pair` (T, K), >= R for pairs without a row."""

    pair_of_row: Tensor
    row_of_pair: Tensor
    rows_per_expert: Tensor
    """(E,) int64, sums to R."""
    every_pair_has_a_row: bool
    kernels: str = "torch"
    """By which rows are moved (`train.kernels`)."""
    every_row_has_a_pair: bool = True
    """Else rows without one have the pair T * K, of a token after the last, which is zeros."""

    @property
    def num_rows(self) -> int:
        return self.pair_of_row.shape[0]

    @property
    def top_k(self) -> int:
        return self.row_of_pair.shape[1]

    @property
    def token_of_row(self) -> Tensor:
        """(R,) int64."""
        return self.pair_of_row.div(self.top_k, rounding_mode="floor")

    @property
    def triton(self) -> Any:
        """The module of Triton's kernels where rows are moved by them, else None."""
        if self.kernels == "torch":
            return None
        from moe_dist.models import triton_kernels  # not installed everywhere

        return triton_kernels


def sort_by_expert(
    expert_ids_TK: Tensor, num_experts: int, num_rows: int | None, kernels: str = "torch"
) -> Permutation:
    """Stable order of pairs by expert id. `num_rows`: ids below `num_experts`; None if all are."""
    flat = expert_ids_TK.flatten()
    order = flat.sort(stable=True).indices
    row_of_pair = torch.empty_like(order)
    row_of_pair[order] = torch.arange(flat.numel(), device=flat.device)
    counts = count_ids(flat, num_experts)
    complete = num_rows is None or num_rows == flat.numel()
    order = order if complete else order[:num_rows]
    return Permutation(order, row_of_pair.view_as(expert_ids_TK), counts, complete, kernels)


def place_by_expert(expert_ids_TK: Tensor, num_experts: int, places: int, kernels: str = "torch") -> Permutation:
    """As `sort_by_expert`, with `places` rows for every expert however many pairs it has: some without a pair, and
    pairs past them without a row. Sizes are known from shapes alone, so nothing waits for the device."""
    flat = expert_ids_TK.flatten()
    num_pairs, num_rows = flat.numel(), num_experts * places
    pairs, place = torch.arange(num_pairs, device=flat.device), earlier_equals(flat, num_experts)
    row_of_pair = torch.where((flat < num_experts) & (place < places), flat * places + place, pairs + num_rows)
    pair_of_row = flat.new_full((num_rows + num_pairs,), num_pairs)
    pair_of_row[row_of_pair] = pairs
    counts = flat.new_full((num_experts,), places)
    return Permutation(pair_of_row[:num_rows], row_of_pair.view_as(expert_ids_TK), counts, False, kernels, False)


def earlier_equals(ids: Tensor, num_experts: int) -> Tensor:
    """How often each of the 1-D int64 `ids` (at most num_experts) occurs before it, (P,) int64."""
    sorted_ids, order = ids.sort(stable=True)
    counts = count_ids(ids, num_experts + 1)
    first = counts.cumsum(0) - counts
    earlier = torch.empty_like(ids)
    earlier[order] = torch.arange(ids.numel(), device=ids.device) - first[sorted_ids]
    return earlier


def count_ids(ids: Tensor, num_experts: int) -> Tensor:
    """How often each of 0..num_experts-1 occurs in the 1-D int64 `ids` (at most num_experts), (E,) int64.

    Integer sums come out the same in any order; `bincount` would wait for the device to size its result.
    """
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids, torch.ones_like(ids))[:num_experts]


def rows_from_tokens(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """(T, D) -> (R, D): one copy of a token for each of its experts, sorted by expert."""
    return _RowsFromTokens.apply(x_TD, permutation)


def tokens_from_rows(rows_RD: Tensor, weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """(R, D) -> (T, D): the weighted sum of each token's rows, over k in order."""
    return _TokensFromRows.apply(rows_RD, weights_TK, permutation)


def sum_rows(rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """(R, D) -> (T, D): the sum of each token's rows, over k in order."""
    return _SumRows.apply(rows_RD, permutation)


def _token_of_each_row(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """(T, D) -> (R, D)."""
    if not permutation.every_row_has_a_pair:
        x_TD = _with_zeros(x_TD)
    if (triton := permutation.triton) is not None:
        return triton.gather(x_TD, permutation.pair_of_row, permutation.top_k)
    return x_TD.index_select(0, permutation.token_of_row)


def _with_zeros(tensor: Tensor) -> Tensor:
    """(T, X) -> (T + 1, X): one more token, zeros, for rows without a pair."""
    return F.pad(tensor, (0, 0, 0, 1))


def _sum_by_token(rows_RD: Tensor, permutation: Permutation, weights_TK: Tensor | None) -> Tensor:
    """(R, D) -> (T, D): each token's rows, weighted or as they are, summed over k in order.

    A weighted sum of picked rows is what an embedding bag is; no (T, K, D) copy of the rows is made.
    """
    num_tokens, top_k = permutation.row_of_pair.shape
    if permutation.num_rows == 0:
        return rows_RD.new_zeros(num_tokens, rows_RD.shape[1])
    if (triton := permutation.triton) is not None:
        return triton.sum_by_token(rows_RD, permutation.row_of_pair, weights_TK)
    weights = None if weights_TK is None else weights_TK.flatten().to(rows_RD.dtype)
    row, present = permutation.row_of_pair, None
    if permutation.every_pair_has_a_row:
        rows = row.flatten()
        starts = torch.arange(0, rows.numel(), top_k, device=rows.device)
    elif not permutation.every_row_has_a_pair:
        # Any row, times zero. That is no zero where the row is not finite: but then the step is lost already.
        has_row = (row < permutation.num_rows).flatten()
        rows = row.flatten().clamp(max=permutation.num_rows - 1)
        starts = torch.arange(0, rows.numel(), top_k, device=rows.device)
        weights = has_row.to(rows_RD.dtype) if weights is None else weights.masked_fill(~has_row, 0.0)
    else:
        # Bags of different lengths. Sorting finds the pairs with a row without asking the device how many.
        present, rows = permutation.pair_of_row.sort()
        sizes = (row < permutation.num_rows).sum(1)
        starts = sizes.cumsum(0) - sizes
    if weights is not None and present is not None:
        weights = weights.index_select(0, present)
    return F.embedding_bag(rows, rows_RD, starts, mode="sum", per_sample_weights=weights)


def _row_dots(a_RD: Tensor, b_RD: Tensor) -> Tensor:
    """Dot product of each row of a with the same row of b, (R,) float32 or float64."""
    wide = torch.promote_types(a_RD.dtype, full_dtype())
    # On a CPU the products of a few rows stay in the cache.
    size = _ROWS_IN_CACHE if a_RD.device.type == "cpu" else max(1, a_RD.shape[0])
    parts = zip(a_RD.split(size), b_RD.split(size), strict=True)
    return torch.cat([(a * b).sum(1, dtype=wide) for a, b in parts])


class _RowsFromTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _token_of_each_row(x_TD, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _sum_by_token(grad_RD.contiguous(), ctx.permutation, None), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _sum_by_token(rows_RD.contiguous(), permutation, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return _token_of_each_row(grad_TD, ctx.permutation), None


class _TokensFromRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_TK: Tensor, permutation: Permutation) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK)
        ctx.permutation = permutation
        return _sum_by_token(rows_RD.contiguous(), permutation, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RD, weights_TK = ctx.saved_tensors
        want_rows, want_weights, _ = ctx.needs_input_grad
        pairs, num_tokens = ctx.permutation.pair_of_row, len(grad_TD)
        if not ctx.permutation.every_row_has_a_pair:
            grad_TD, weights_TK = _with_zeros(grad_TD), _with_zeros(weights_TK)
        if (triton := ctx.permutation.triton) is not None:
            grad_rows, grad_weights = triton.weighted_gradients(
                grad_TD, rows_RD, weights_TK, pairs, want_rows, want_weights
            )
            return grad_rows, None if grad_weights is None else grad_weights[:num_tokens], None
        grad_rows = grad_TD.index_select(0, ctx.permutation.token_of_row)
        grad_weights = None
        if want_weights:
            grad_weights = weights_TK.new_zeros(weights_TK.numel())
            if pairs.numel():
                dots = _row_dots(rows_RD, grad_rows).to(weights_TK.dtype)
                grad_weights.index_copy_(0, pairs, dots)
            grad_weights = grad_weights.view_as(weights_TK)[:num_tokens]
        if not want_rows:
            return None, grad_weights, None
        weight_of_row = weights_TK.flatten().index_select(0, pairs).to(grad_TD.dtype)
        return grad_rows.mul_(weight_of_row[:, None]), grad_weights, None
