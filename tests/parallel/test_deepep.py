"""Dispatch by DeepEP, with a stand-in of its interface (`fixtures/deep_ep_stand_in`): no pair of GPUs is needed.

What the package itself does is not tested here: that its calls are these, and what becomes of their answers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patches import Replace
from ranks import run_ranks
from run_files import complaint, load

from moe_dist.models.router import Routing
from moe_dist.parallel import dispatch_choice
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.dispatchers import build_dispatcher

STAND_IN = str(Path(__file__).parents[1] / "fixtures" / "deep_ep_stand_in")
HIDDEN, EXPERTS, TOP_K = 8, 6, 3


def both_ways(tokens: list[int], seed: int) -> list[float]:
    """Largest relative differences from `all_to_all` on this rank: output, gradients of tokens, weights and experts;
    rows of each expert that differ, and rows counted."""
    if STAND_IN not in sys.path:
        sys.path.insert(0, STAND_IN)
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    generator = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randn(tokens[rank], HIDDEN, generator=generator)
    weights = torch.rand(tokens[rank], TOP_K, generator=generator)
    ids = torch.rand(tokens[rank], EXPERTS, generator=generator).topk(TOP_K).indices
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, EXPERTS)  # pairs that have no place
    local = EXPERTS // group.size()
    maps = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(seed))[rank * local :][:local]
    upstream = torch.randn(tokens[rank], HIDDEN, generator=generator)
    results, counts = [], []
    for name in ("deepep", "all_to_all"):
        clock = Clock(torch.device("cpu"))
        dispatcher = build_dispatcher(name, group, EXPERTS, 3, clock)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weights, maps)]
        rows, plan = dispatcher.dispatch(leaves[0], Routing(leaves[1], ids))  # type: ignore[attr-defined]
        chunks = rows.split(plan.rows_per_expert.tolist())
        done = torch.cat([chunk @ matrix for chunk, matrix in zip(chunks, leaves[2].unbind(0), strict=True)])
        out = dispatcher.combine(done, plan)  # type: ignore[attr-defined]
        out.backward(upstream)
        results.append([out.detach(), *[leaf.grad for leaf in leaves]])
        counts.append([*plan.rows_per_expert.tolist(), *clock.take_traffic()[1:]])
    differ = [float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(*results, strict=True)]
    return [*differ, float(counts[0] != counts[1])]


@pytest.mark.dist
@pytest.mark.parametrize("tokens", [[7, 5], [0, 4], [0, 0]], ids=str)
def test_as_all_to_all(tokens: list[int]) -> None:
    """Float32, tokens without an expert and ranks without a token; gradients of routing weights too.

    Planted: no gradient of weights beside rows; the gradient of a combine doubled; experts elsewhere taken for the
    first one here.
    """
    for found in run_ranks(both_ways, 2, tokens, 1):
        assert max(found) < 1e-6


def test_it_is_refused_where_it_is_not_installed(replace: Replace) -> None:
    replace(dispatch_choice, "find_spec", lambda name: None)
    two: Any = SimpleNamespace(size=lambda: 2)
    with pytest.raises(ValueError, match=r"parallel.dispatcher=deepep: the package deep_ep is not installed; .*=auto"):
        build_dispatcher("deepep", two, 4, 0)


def test_experts_that_draw_noise_are_refused(replace: Replace) -> None:
    replace(dispatch_choice, "find_spec", lambda name: object())
    two: Any = SimpleNamespace(size=lambda: 2)
    dispatcher = build_dispatcher("deepep", two, 4, 0)
    routing = Routing(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), noise_seed=1)
    with pytest.raises(ValueError, match=r"parallel.dispatcher=deepep: .*; take parallel.dispatcher=auto, or set"):
        dispatcher.begin_dispatch(torch.zeros(1, 8), routing)


@pytest.mark.parametrize(
    ("more", "said"),
    {
        "train: {bf16: false}": "it moves bfloat16 alone; set train.bf16 or train.pure_bf16",
        "train: {bf16: true}⏎model: {expert: swiglu_loop}": "model.expert=swiglu_loop computes in float32",
        "train: {bf16: true, deterministic: true}": "train.deterministic=true",
        "train: {bf16: true}⏎launch: {device: cpu}": "launch.device=cpu",
        "train: {bf16: true}⏎model: {hidden_size: 36, num_attention_heads: 9}": "model.hidden_size=36",
    }.items(),
)
def test_what_it_cannot_do_is_said(tmp_path: Path, more: str, said: str) -> None:
    text = complaint(tmp_path, "parallel: {ep_size: 2, dispatcher: deepep}\n" + more.replace("⏎", "\n"))
    assert "parallel.dispatcher=deepep: " in text
    assert said in text


def test_what_it_can(tmp_path: Path) -> None:
    for how in ("bf16: true", "pure_bf16: true"):
        config, _ = load(tmp_path, f"parallel: {{ep_size: 2, dispatcher: deepep}}\ntrain: {{{how}}}")
        assert config.parallel.dispatcher == "deepep"
