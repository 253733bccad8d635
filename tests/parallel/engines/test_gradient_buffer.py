"""Gradients travel while backward computes others: in one order on every rank, each only when it is whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from moe_dist.parallel.engines.gradient_buffer import GradientBuffer

SMALL = 64
"""Bytes of a bucket: every layer of `layers` has one of its own."""


def layers(count: int = 4) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(count))


def buffer_of(model: nn.ModuleList) -> GradientBuffer:
    return GradientBuffer(model.named_parameters(), torch.device("cpu"), dist.group.WORLD, SMALL)


def through(model: nn.ModuleList, used: tuple[int, ...]) -> torch.Tensor:
    x = torch.full((2, 4), 1.0 + dist.get_rank())
    for number in used:
        x = model[number](x)
    return x.sum()


def sent_during_backward() -> tuple[int, int]:
    model = layers()
    buffer = buffer_of(model)
    seen: list[int] = []
    model[0].weight.register_post_accumulate_grad_hook(lambda _: seen.append(len(buffer._flights)))
    buffer.zero()
    buffer.reduce_early()
    through(model, (0, 1, 2, 3)).backward()
    in_backward = len(buffer._flights)
    buffer.send_rest()
    buffer.wait()
    return seen[0], in_backward


def sums_with_other_layers_used() -> tuple[bool, list[float]]:
    """Rank 0 leaves out layer 3, whose bucket would go first, rank 1 layer 1."""
    model = layers()
    buffer = buffer_of(model)
    used = (0, 1, 2) if dist.get_rank() == 0 else (0, 2, 3)
    through(model, used).backward()
    whole = buffer.flat.clone()
    dist.all_reduce(whole)
    buffer.zero()
    buffer.reduce_early()
    through(model, used).backward()
    buffer.send_rest()
    buffer.wait()
    return bool(torch.equal(buffer.flat, whole)), [float(view.abs().sum()) for view in buffer.views.values()]


def a_second_gradient() -> str:
    model = layers(1)
    buffer = buffer_of(model)
    buffer.reduce_early()
    through(model, (0,)).backward()
    try:
        through(model, (0,)).backward()
    except RuntimeError as error:
        return str(error)
    finally:
        buffer.wait()
    return ""


@pytest.mark.dist
def test_buckets_leave_before_backward_ends() -> None:
    for before_first_layer, in_backward in run_ranks(sent_during_backward, 2):
        assert before_first_layer >= 3  # its own may go before or after that hook
        assert in_backward == 4


@pytest.mark.dist
def test_ranks_that_use_other_layers_sum_the_same() -> None:
    found = run_ranks(sums_with_other_layers_used, 2)
    assert all(equal for equal, _ in found)
    assert found[0][1] == found[1][1]
    assert all(found[0][1])


@pytest.mark.dist
def test_a_gradient_after_its_bucket_has_left_is_an_error() -> None:
    """Else it would stay on its rank, without a word."""
    for said in run_ranks(a_second_gradient, 2):
        assert said.startswith("0.weight: ")
        assert "parallel.overlap_grad_reduce=false" in said
