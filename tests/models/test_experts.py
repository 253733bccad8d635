"""Stacked experts against the plain loop, a person's own experts, layouts and poison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models import swiglu
from moe_dist.models.context import RoutingContext
from moe_dist.models.experts import (
    EXPERTS,
    Expert,
    ExpertList,
    Experts,
    LoopExperts,
    build_experts,
    register_expert,
)
from moe_dist.models.malloc_tuning import keep_freed_memory
from moe_dist.models.moe import MoE


def pair(num_experts: int, hidden: int, width: int, dtype: torch.dtype) -> tuple[Experts, LoopExperts]:
    fast, loop = Experts(num_experts, hidden, width), LoopExperts(num_experts, hidden, width)
    fast.initialize(lambda expert: expert, 0.3)
    loop.load_state_dict(fast.state_dict())
    return fast.to(dtype), loop.to(dtype)


def run(module: nn.Module, rows: Tensor, counts: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    rows = rows.clone().requires_grad_()
    out = module(rows, counts)
    gradients = torch.autograd.grad(out, (rows, *module.parameters()), upstream)
    return out.detach(), *gradients


class Kernel:
    """torch's grouped matmul, its calls counted; what it leaves as it was in memory is NaN."""

    def __init__(self) -> None:
        self.calls, self.real = 0, swiglu.grouped_mm

    def __call__(self, rows: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
        self.calls += 1
        out = self.real(rows, weights, offs=offs)
        if weights.ndim == 3:
            out[int(offs[-1]) :] = float("nan")
        return out


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """In the place of the kernel that experts call: a test says how often they do."""
    counted = Kernel()
    monkeypatch.setattr(swiglu, "grouped_mm", counted)
    return counted


def assert_equal_to_loop(counts: list[int], hidden: int, width: int, dtype: torch.dtype, chunk_rows: int = 0) -> None:
    torch.manual_seed(0)
    fast, loop = pair(len(counts), hidden, width, dtype)
    fast.chunk_rows = chunk_rows
    rows, upstream = torch.randn(2, sum(counts), hidden).to(dtype)
    split = torch.tensor(counts)
    # bfloat16 against the float32 loop: both round, so neither is the other's reference.
    exact = LoopExperts(len(counts), hidden, width)
    exact.load_state_dict(loop.float().state_dict())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(
        run(fast, rows, split, upstream), run(exact, rows.float(), split, upstream.float()), strict=True
    ):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        assert (ours.float() - theirs).norm() <= tolerance * theirs.norm()


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(0, 40)), min_size=1, max_size=9),
    hidden=st.sampled_from([1, 3, 8, 16]),
    width=st.sampled_from([1, 5, 8, 24]),
)
def test_equal_to_the_loop(counts: list[int], hidden: int, width: int) -> None:
    """Any shape in float32; bfloat16 has no relative bound where one number cancels, so it is held below."""
    assert_equal_to_loop(counts, hidden, width, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "counts",
    [[300, 0, 500, 1], [0, 0, 0], [2] * 70, [0, 900], [1] + [0] * 63],
    ids=lambda c: f"{len(c)}x{max(c)}",
)
def test_equal_to_the_loop_for_many_and_for_few_rows(counts: list[int], dtype: torch.dtype) -> None:
    """Trap 4 (gradients of idle experts are zero, not None). Planted: grad_up and grad_gate exchanged in
    `swiglu_backward`; rows returned as they are for R = 0."""
    assert_equal_to_loop(counts, 32, 16, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 113, 114])
@pytest.mark.parametrize("counts", [[30, 0, 50, 1, 33], [114], [0, 0, 114, 0]], ids=lambda c: f"{len(c)}x{max(c)}")
def test_in_chunks_equal_to_the_loop(counts: list[int], chunk_rows: int, dtype: torch.dtype) -> None:
    """An expert whose rows are in several chunks, several experts in one, a last chunk of one row. Planted: gradients
    of the last chunk alone; the first chunk's gate_up in all of them; offsets not moved."""
    assert_equal_to_loop(counts, 16, 24, dtype, chunk_rows)


def test_what_backward_needs_does_not_grow_with_the_load() -> None:
    """Experts that are chosen four times as often hold their rows four times, and no gate_up."""
    experts = Experts(4, 16, 64)
    experts.initialize(lambda index: index, 0.1)
    held = {}
    for share in (64, 256):
        rows = torch.randn(share, 16, requires_grad=True)
        for experts.chunk_rows in (0, 64):
            out = experts(rows, torch.tensor([share, 0, 0, 0]))
            saved = {t.data_ptr(): t.numel() for t in out.grad_fn.saved_tensors if t is not None}
            beside = sum(p.numel() for p in experts.parameters()) + experts.num_local
            held[share, experts.chunk_rows] = sum(saved.values()) - beside
    width = 2 * 64
    assert held[64, 0] == held[64, 64] == 64 * (16 + width)
    assert held[256, 0] == 256 * (16 + width)
    assert held[256, 64] == 256 * 16


@pytest.mark.parametrize("frozen", ["rows", "w_gate_up", "w_down", "weights"])
def test_only_the_gradients_that_are_wanted(frozen: str) -> None:
    fast, loop = pair(3, 8, 8, torch.float32)
    rows, counts = torch.randn(6, 8), torch.tensor([2, 0, 4])
    results = []
    for module in (fast, loop):
        mine = rows.clone().requires_grad_(frozen != "rows")
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(frozen not in (name, "weights"))
            parameter.grad = None
        module(mine, counts).square().sum().backward()
        results.append([mine.grad, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_accumulate_and_repeat_bitwise() -> None:
    fast, _ = pair(4, 16, 16, torch.float32)
    rows, counts = torch.randn(50, 16), torch.tensor([20, 0, 29, 1])
    fast(rows, counts).square().sum().backward()
    once = [p.grad.clone() for p in fast.parameters()]
    fast(rows, counts).square().sum().backward()
    assert all(torch.equal(p.grad, 2 * gradient) for p, gradient in zip(fast.parameters(), once, strict=True))


def test_gradients_come_in_the_same_order_with_and_without_rows() -> None:
    """DeepSpeed's ZeRO 2 reduces them as they come. Seen red: a rank whose micro-batch is all padding took the plain
    loop, and added its gradient of `w_down` to the others' of `w_gate_up` (`verify --layouts ep1-zero2-deepspeed`).
    """
    orders = []
    for counts in ([3, 0, 5], [0, 0, 0]):
        experts, _ = pair(3, 16, 16, torch.float32)
        order: list[str] = []
        for name, parameter in experts.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
        rows = torch.randn(sum(counts), 16, requires_grad=True)
        experts(rows, torch.tensor(counts)).sum().backward()
        orders.append(order)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 2


def test_inputs_and_upstream_gradients_are_not_written_to() -> None:
    fast, _ = pair(3, 16, 16, torch.float32)
    rows, counts, upstream = torch.randn(9, 16), torch.tensor([4, 0, 5]), torch.randn(9, 16)
    kept, kept_upstream = rows.clone(), upstream.clone()
    out = fast(rows.requires_grad_(), counts)
    out_kept = out.detach().clone()
    first = torch.autograd.grad(out, tuple(fast.parameters()), upstream, retain_graph=True)
    second = torch.autograd.grad(out, tuple(fast.parameters()), upstream)
    assert torch.equal(rows, kept)
    assert torch.equal(upstream, kept_upstream)
    assert torch.equal(out, out_kept)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_and_expanded_upstream_gradients() -> None:
    fast, loop = pair(2, 16, 16, torch.float32)
    rows, counts = torch.randn(5, 16), torch.tensor([3, 2])
    for upstream in (torch.ones(1, 1).expand(5, 16), torch.randn(16, 5).T):
        mine, reference = run(fast, rows, counts, upstream), run(loop, rows, counts, upstream)
        for ours, theirs in zip(mine, reference, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 16), (torch.float32, 5), (torch.bfloat16, 12)], ids=str)
def test_what_the_kernel_does_not_take_is_the_loop(dtype: torch.dtype, width: int, kernel: Kernel) -> None:
    """float64, and strides that are no multiples of 16 bytes. Planted: `_grouped_mm_takes` without either condition."""
    fast, loop = pair(3, 16, width, torch.float32)
    fast, loop, counts = fast.to(dtype), loop.to(dtype), torch.tensor([7, 0, 9])
    rows, upstream = torch.randn(2, 16, 16).to(dtype)
    for ours, theirs in zip(run(fast, rows, counts, upstream), run(loop, rows, counts, upstream), strict=True):
        assert torch.equal(ours, theirs)
    assert kernel.calls == 0


def test_freed_memory_is_kept_only_when_asked_and_never_fails() -> None:
    assert isinstance(keep_freed_memory(), bool)
    assert torch.ones(1 << 20).sum() == 1 << 20


@pytest.mark.parametrize("counts", [[7, 0, 0], [0, 3, 0], [40, 0, 200], [1, 1, 1]])
def test_no_row_or_gradient_is_uninitialised(counts: list[int], kernel: Kernel) -> None:
    """Trap 6. Planted: `offsets[-1] -= 1` before the grouped matmuls (rows past the last offset)."""
    fast, loop = pair(3, 16, 16, torch.float32)
    rows = torch.randn(sum(counts), 16)
    ours = run(fast, rows, torch.tensor(counts), torch.ones_like(rows))
    assert kernel.calls == 6
    assert all(tensor.isfinite().all() for tensor in ours)
    for mine, theirs in zip(ours, run(loop, rows, torch.tensor(counts), torch.ones_like(rows)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients() -> None:
    fast, loop = pair(4, 16, 16, torch.float32)
    rows, counts = torch.randn(30, 16), torch.tensor([10, 0, 15, 5])
    with torch.autocast("cpu", torch.bfloat16):
        out = fast(rows, counts)
    out.float().square().sum().backward()
    exact = loop(rows, counts)
    exact.square().sum().backward()
    assert out.dtype == torch.bfloat16
    for ours, theirs in zip(fast.parameters(), loop.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - theirs.grad).norm() < 2e-2 * theirs.grad.norm()


def test_shards_hold_the_weights_of_the_whole() -> None:
    """Trap 24. Planted: the seed of local index instead of global id; one seed for all experts."""
    whole = Experts(8, 6, 4)
    whole.initialize(lambda expert: 100 + expert, 0.02)
    parts = []
    for first in (0, 3, 6):
        part = Experts(8, 6, 4)
        part.shard(first, min(3, 8 - first))
        part.initialize(lambda expert: 100 + expert, 0.02)
        assert part.first_expert == first
        parts.append(part)
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, torch.cat([dict(part.named_parameters())[name] for part in parts]))
        assert len({expert.detach().numpy().tobytes() for expert in weight}) == 8
    again = Experts(8, 6, 4)
    again.load_state_dict(whole.state_dict())
    again.shard(2, 5)
    again.shard(4, 2)
    assert torch.equal(again.w_down, whole.w_down[4:6])


class Dropped(Expert):
    """A person's own expert, with dropout."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.layers = nn.Sequential(
            nn.Linear(hidden_size, intermediate_size),
            nn.GELU(),
            nn.Dropout(0.3),
            nn.Linear(intermediate_size, hidden_size),
        )

    def forward(self, x_RD: Tensor) -> Tensor:
        return self.layers(x_RD)


def train(config: ModelConfig, steps: int = 30) -> tuple[float, float, MoE]:
    """First and last loss of teaching one layer to double its input."""
    torch.manual_seed(0)
    layer = MoE(config, BalanceConfig(), layer=0)
    layer.experts.initialize(lambda expert: expert, 0.1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 16, config.hidden_size)
        loss = (layer(x, RoutingContext(token_scale=1 / 64)) - 2 * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1], layer


@pytest.mark.parametrize("name", ["dropped", f"{__name__}:Dropped"])
def test_a_persons_own_expert_trains(name: str) -> None:
    if name == "dropped":
        EXPERTS._entries.pop(name, None)
        register_expert(name)(Dropped)
    first, last, layer = train(ModelConfig(hidden_size=16, num_experts=4, moe_intermediate_size=16, expert=name))
    assert last < 0.7 * first
    assert isinstance(layer.experts, ExpertList)
    layer.eval()
    x = torch.randn(2, 5, 16)
    assert torch.equal(layer(x), layer(x))


def test_own_experts_are_seeded_by_global_id_and_sharded() -> None:
    """Trap 24. Planted: `initialize` without `manual_seed`."""

    def build(first: int, count: int) -> dict[str, Tensor]:
        experts = ExpertList(lambda: Dropped(6, 4), 6)
        experts.shard(first, count)
        experts.initialize(lambda expert: 7 + expert, 0.02)
        return experts.state_dict()

    whole = build(0, 6)
    parts = build(0, 2) | build(2, 4)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert len({whole[f"experts.{e}.layers.0.weight"].numpy().tobytes() for e in range(6)}) == 6


@pytest.mark.parametrize("kind", ["list", "loop", "stacked"])
def test_no_rows_give_zero_gradients(kind: str) -> None:
    """Trap 4. Planted: `if R == 0: return rows` in `Experts.forward`."""
    make: dict[str, Callable[[], Any]] = {
        "list": lambda: ExpertList(lambda: Dropped(8, 8), 3),
        "loop": lambda: LoopExperts(3, 8, 8),
        "stacked": lambda: Experts(3, 8, 8),
    }
    experts = make[kind]()
    experts.initialize(lambda expert: expert, 0.1)
    rows = torch.empty(0, 8, requires_grad=True)
    experts(rows, torch.zeros(3, dtype=torch.int64)).sum().backward()
    assert rows.grad.shape == (0, 8)
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in experts.parameters())


def test_registry_names_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"model.expert=swigul: known are .*swiglu.*; did you mean swiglu\?"):
        build_experts(ModelConfig(expert="swigul"))
    with pytest.raises(ValueError, match="cannot be imported"):
        build_experts(ModelConfig(expert="nowhere.at_all:Expert"))
    with pytest.raises(ValueError, match="registered already"):
        register_expert("swiglu")(Dropped)
    with pytest.raises(NotImplementedError, match=r"Expert.forward: \(R, D\)"):
        Expert(4, 4)(torch.zeros(1, 4))
