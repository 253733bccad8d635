"""Recomputation by itself: how often a pass is repeated, what is not asked twice, and what it leaves behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from moe_dist.models.recompute import is_recomputing, once, recompute


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 4))


def test_split_backward_repeats_once() -> None:
    """What `zero_bubble` does: gradients of inputs first, then of each group of weights, each a run of autograd.

    Seen to fail with `torch.utils.checkpoint`, which repeats the pass in each of the three.
    """
    net, x = layers(), torch.randn(3, 4, requires_grad=True)
    passes: list[bool] = []

    def run(x: Tensor) -> Tensor:
        passes.append(is_recomputing())
        return net(x)

    torch.manual_seed(1)
    wanted = torch.autograd.grad(run(x).square().sum(), (x, *net.parameters()))
    torch.manual_seed(1)
    passes.clear()
    loss = recompute(run, x).square().sum()
    state = torch.get_rng_state()
    groups = [(x,), tuple(net[0].parameters()), tuple(net[3].parameters())]
    found = [grad for group in groups for grad in torch.autograd.grad(loss, group, retain_graph=True)]
    assert passes == [False, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, found, wanted))


def test_what_is_asked_once_is_not_asked_again() -> None:
    """Reductions and exchanges between ranks, and decisions inside and around them. Planted: `once` that computes
    again; decisions inside `once` left among the results (the order of the repeated pass is then another)."""
    asked: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        asked.append(is_recomputing())
        return x.detach().topk(1).indices + len(asked)

    def run(x: Tensor) -> Tensor:
        first = x.exp().detach().topk(2).indices
        shift = once(lambda: ask(x))
        last = (x * 2).detach().sort().indices
        return (x * x).sin() * (first.sum() + 10 * shift.sum() + 100 * last[0])

    x = torch.randn(5, requires_grad=True)
    out = recompute(run, x)
    (found,) = torch.autograd.grad(out.sum(), x)
    assert asked == [False]
    factor = (out / (x * x).sin()).detach()
    torch.testing.assert_close(found, factor * 2 * x.detach() * (x * x).cos().detach())
    assert once(lambda: 7) == 7  # outside of any recomputation


def test_nothing_is_kept_after_backward() -> None:
    net, x = layers(), torch.randn(3, 4, requires_grad=True)
    inside: list[weakref.ref[Tensor]] = []

    def run(x: Tensor) -> Tensor:
        hidden = net[0](x)
        inside.append(weakref.ref(hidden))
        return net[3](nn.functional.gelu(hidden))

    out = recompute(run, x)
    assert inside[0]() is None  # dropped, which is what it is for
    out.sum().backward()
    gc.disable()
    try:
        del out
        assert all(ref() is None for ref in inside)
    finally:
        gc.enable()


@pytest.mark.parametrize("change", ["shape", "fewer"])
def test_a_pass_that_is_another_is_refused(change: str) -> None:
    calls = 0

    def run(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            return x.sin().exp()
        return x[:1].sin().exp() if change == "shape" else x.sin()

    out = recompute(run, torch.randn(3, requires_grad=True))
    with pytest.raises(RuntimeError, match="differs from its forward pass"):
        out.sum().backward()
