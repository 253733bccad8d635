"""Tokens to rows sorted by expert, and back, with backward passes that are gathers in a fixed order.

A *pair* is one (token, chosen expert): pair p = t * K + k. A pair whose expert id is E (padding, or no place
left) has no row. Plain indexing would do the same sums by scatter-add, in random order on a GPU.

Shape suffixes: T tokens, K top-k, P = T * K pairs, R rows (pairs that are computed), D hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Permutation:
    """Where every pair went. `pair_of_row` (R,); `row_of_pair` (T, K), >= R for pairs without a row."""

    pair_of_row: Tensor
    row_of_pair: Tensor
    rows_per_expert: Tensor
    """(E,) int64, sums to R."""
    every_pair_has_a_row: bool

    @property
    def num_rows(self) -> int:
        return self.pair_of_row.shape[0]


def sort_by_expert(expert_ids_TK: Tensor, num_experts: int, num_rows: int | None) -> Permutation:
    """Stable order of pairs by expert id. `num_rows`: ids below `num_experts`; None if all are."""
    flat = expert_ids_TK.flatten()
    order = flat.sort(stable=True).indices
    row_of_pair = torch.empty_like(order)
    row_of_pair[order] = torch.arange(flat.numel(), device=flat.device)
    counts = count_ids(flat, num_experts)
    complete = num_rows is None or num_rows == flat.numel()
    return Permutation(
        order if complete else order[:num_rows], row_of_pair.view_as(expert_ids_TK), counts, complete
    )


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


def _rows_by_pair(rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """(R, D) -> (T, K, D), zeros for pairs without a row."""
    num_tokens, top_k = permutation.row_of_pair.shape
    if permutation.every_pair_has_a_row:
        picked = rows_RD.index_select(0, permutation.row_of_pair.flatten())
    elif permutation.num_rows == 0:
        picked = rows_RD.new_zeros(num_tokens * top_k, rows_RD.shape[1])
    else:
        row = permutation.row_of_pair.flatten()
        missing = row >= permutation.num_rows
        picked = rows_RD.index_select(0, row.masked_fill(missing, 0)).masked_fill_(missing[:, None], 0)
    return picked.view(num_tokens, top_k, rows_RD.shape[1])


class _RowsFromTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        top_k = permutation.row_of_pair.shape[1]
        return x_TD.index_select(0, permutation.pair_of_row.div(top_k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _rows_by_pair(grads[0], ctx.permutation).sum(1), None


class _TokensFromRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_TK: Tensor, permutation: Permutation) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK)
        ctx.permutation = permutation
        weights = weights_TK.to(rows_RD.dtype)
        return torch.bmm(weights[:, None, :], _rows_by_pair(rows_RD, permutation)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RD, weights_TK = ctx.saved_tensors
        permutation, grad_TD = ctx.permutation, grads[0]
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            pairs = permutation.pair_of_row
            weight_of_row = weights_TK.flatten().index_select(0, pairs).to(grad_TD.dtype)
            token_of_row = pairs.div(weights_TK.shape[1], rounding_mode="floor")
            grad_rows = grad_TD.index_select(0, token_of_row).mul_(weight_of_row[:, None])
        if ctx.needs_input_grad[1]:
            rows_TKD = _rows_by_pair(rows_RD, permutation)
            grad_weights = torch.bmm(rows_TKD, grad_TD[:, :, None]).squeeze(2).to(weights_TK.dtype)
        return grad_rows, grad_weights, None
