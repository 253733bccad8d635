"""Permutation functions against a dense one-hot specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.models.permute import place_by_expert, rows_from_tokens, sort_by_expert, tokens_from_rows
from moe_dist.models.routing import drop_over_capacity

sizes = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 6), st.integers(1, 7))


def one_hot_order(ids_TK: Tensor, num_experts: int) -> Tensor:
    """(R, T * K) 0/1 float64: row r is pair p; pairs in order of (expert, pair), those without an expert left out."""
    flat = ids_TK.flatten().tolist()
    pairs = sorted((expert, pair) for pair, expert in enumerate(flat) if expert < num_experts)
    order = torch.zeros(len(pairs), len(flat), dtype=torch.float64)
    for row, (_, pair) in enumerate(pairs):
        order[row, pair] = 1.0
    return order


def draw_ids(num_tokens: int, top_k: int, num_experts: int, seed: int, complete: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    top = num_experts if complete else num_experts + 1
    return torch.randint(0, top, (num_tokens, top_k), generator=generator)


@settings(deadline=None, max_examples=60)
@given(sizes=sizes, seed=st.integers(0, 1000), complete=st.booleans())
def test_rows_and_tokens_equal_the_one_hot_products(
    sizes: tuple[int, int, int, int], seed: int, complete: bool
) -> None:
    num_tokens, top_k, num_experts, width = sizes
    ids = draw_ids(num_tokens, top_k, num_experts, seed, complete)
    torch.manual_seed(seed)
    x = torch.randn(num_tokens, width, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(num_tokens, top_k, dtype=torch.float64, requires_grad=True)
    order = one_hot_order(ids, num_experts)
    permutation = sort_by_expert(ids, num_experts, None if complete else int((ids < num_experts).sum()))
    assert torch.equal(permutation.rows_per_expert, (ids.flatten()[:, None] == torch.arange(num_experts)).sum(0))
    assert permutation.num_rows == order.shape[0]

    rows = rows_from_tokens(x, permutation)
    rows_expected = order @ x.repeat_interleave(top_k, 0)
    torch.testing.assert_close(rows, rows_expected)
    moved = rows.detach().square().requires_grad_()
    out = tokens_from_rows(moved, weights, permutation)
    placed = order.T @ moved
    expected = (placed.view(num_tokens, top_k, width) * weights[..., None]).sum(1)
    torch.testing.assert_close(out, expected)

    upstream_rows, upstream_out = torch.randn_like(rows), torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(rows, x, upstream_rows), torch.autograd.grad(rows_expected, x, upstream_rows)
    )
    torch.testing.assert_close(
        torch.autograd.grad(out, (moved, weights), upstream_out),
        torch.autograd.grad(expected, (moved, weights), upstream_out),
    )


@settings(deadline=None, max_examples=60)
@given(sizes=sizes, seed=st.integers(0, 1000), places=st.integers(1, 12))
def test_places_hold_the_first_pairs_and_zeros(sizes: tuple[int, int, int, int], seed: int, places: int) -> None:
    """Rows and all gradients are those of `sort_by_expert` after the drop, with zeros in between, also where what is
    computed of an empty place is not zero. Planted: empty places with the first pair; pairs without a row weighted."""
    num_tokens, top_k, num_experts, width = sizes
    ids = draw_ids(num_tokens, top_k, num_experts, seed, complete=False)
    kept = drop_over_capacity(ids, num_experts, places)
    counts = (kept.flatten()[:, None] == torch.arange(num_experts)).sum(0).tolist()
    taken = torch.tensor([expert * places + n for expert, count in enumerate(counts) for n in range(count)]).long()
    orders = sort_by_expert(kept, num_experts, len(taken)), place_by_expert(ids, num_experts, places)
    assert orders[1].rows_per_expert.tolist() == [places] * num_experts
    torch.manual_seed(seed)
    x = torch.randn(num_tokens, width, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(num_tokens, top_k, dtype=torch.float64, requires_grad=True)
    bias = torch.rand(width, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(num_tokens, width, dtype=torch.float64)
    wanted, found = [], []
    for results, order, mine in ((wanted, orders[0], slice(None)), (found, orders[1], taken)):
        rows = rows_from_tokens(x, order)
        out = tokens_from_rows(rows.exp() + bias, weights, order)
        results += [rows.detach()[mine], out.detach(), *torch.autograd.grad(out, (x, weights, bias), upstream)]
    torch.testing.assert_close(found, wanted)
    rows[taken] = 0.0
    assert not rows.count_nonzero()


@pytest.mark.parametrize("dropped", ["none", "some", "all"])
def test_gradcheck(dropped: str) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[0, 2], [1, 0], [2, 2], [1, 0]])
    if dropped != "none":
        ids[1], ids[3, 1] = 3, 3
    if dropped == "all":
        ids[:] = 3
    permutation = sort_by_expert(ids, 3, int((ids < 3).sum()))
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(permutation.num_rows, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rows_from_tokens(x, permutation), (x,))
    assert torch.autograd.gradcheck(lambda r, w: tokens_from_rows(r, w, permutation), (rows, weights))


def test_only_the_gradients_that_are_wanted() -> None:
    permutation = sort_by_expert(torch.tensor([[0, 1]]), 2, None)
    rows, weights = torch.randn(2, 3), torch.rand(1, 2, requires_grad=True)
    tokens_from_rows(rows, weights, permutation).sum().backward()
    torch.testing.assert_close(weights.grad, rows.sum(1)[None])


def test_bfloat16_rows_with_float32_weights() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 4, (16, 2))
    permutation = sort_by_expert(ids, 4, None)
    rows = torch.randn(32, 8).bfloat16().requires_grad_()
    weights = torch.rand(16, 2, requires_grad=True)
    out = tokens_from_rows(rows, weights, permutation)
    out.sum().backward()
    assert out.dtype == rows.grad.dtype == torch.bfloat16
    assert weights.grad.dtype == torch.float32
    expected = tokens_from_rows(rows.detach().double(), weights.detach().double(), permutation)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_combine_is_bitwise_repeatable() -> None:
    """Trap 28. Planted: `_rows_by_pair(...)` replaced by `zeros.index_add_` over rows in a random order."""
    torch.manual_seed(0)
    ids = torch.randint(0, 8, (300, 4))
    permutation = sort_by_expert(ids, 8, None)
    rows, weights = torch.randn(1200, 16), torch.rand(300, 4)
    results = []
    for _ in range(3):
        r, w = rows.clone().requires_grad_(), weights.clone().requires_grad_()
        out = tokens_from_rows(r, w, permutation)
        out.square().sum().backward()
        results.append((out, r.grad, w.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # A fixed order over k: token by token the same sum, whatever else is in the batch.
    first = sort_by_expert(ids[:7], 8, None)
    again = tokens_from_rows(rows[permutation.row_of_pair[:7].flatten()][first.pair_of_row], weights[:7], first)
    assert torch.equal(again, results[0][0][:7])


@settings(deadline=None, max_examples=80)
@given(sizes=sizes, seed=st.integers(0, 1000), capacity=st.integers(1, 12))
def test_first_come_first_served(sizes: tuple[int, int, int, int], seed: int, capacity: int) -> None:
    """Trap 20. Planted: `sort(stable=False, descending=True)`; choices served before tokens (ids transposed)."""
    num_tokens, top_k, num_experts, _ = sizes
    ids = draw_ids(num_tokens, top_k, num_experts, seed, complete=False)
    chosen = torch.nn.functional.one_hot(ids.flatten(), num_experts + 1)
    place = (chosen.cumsum(0) * chosen).sum(-1) - 1
    keep = (place < capacity) & (ids.flatten() < num_experts)
    expected = torch.where(keep, ids.flatten(), num_experts).view_as(ids)
    assert torch.equal(drop_over_capacity(ids, num_experts, torch.tensor(capacity)), expected)
