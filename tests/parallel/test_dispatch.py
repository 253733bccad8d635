"""Dispatch by all-to-all equals the all-gather specification: rows, outputs and every gradient."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ranks import RankFailure, run_ranks

from moe_dist.models.experts import Experts
from moe_dist.models.moe import Dispatcher
from moe_dist.models.routing import Routing
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.dispatch import expert_order
from moe_dist.parallel.dispatch_specification import AllGatherDispatcher
from moe_dist.parallel.dispatchers import build_dispatcher
from moe_dist.parallel.mesh import Hosts

pytestmark = pytest.mark.dist
HIDDEN = 8


KINDS = ("all_to_all", "dedup", "hierarchical")
GROUPS = [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 1, 2], [3]], [[3, 1], [0], [2]]]
"""Expert-parallel groups side by side, of four, two, three ranks and one."""


@cache
def group_of(number: int) -> dist.ProcessGroup:
    """This rank's group of GROUPS[number]; kept, since every process group has threads."""
    return dist.new_subgroups_by_enumeration(GROUPS[number])[0]


@cache
def hosts_of(members: tuple[tuple[int, ...], ...]) -> Hosts:
    """Four ranks are on two hosts of two; others each on its own."""
    rows = [torch.tensor(group).view((2, 2) if len(group) == 4 else (-1, 1)) for group in members]
    across, _ = dist.new_subgroups_by_enumeration([column for group in rows for column in group.t().tolist()])
    within, _ = dist.new_subgroups_by_enumeration([row for group in rows for row in group.tolist()])
    return Hosts(across, within)


def dispatcher_of(
    kind: str, number: int | None, num_experts: int, layer: int, clock: Clock | None = None, casts: bool = False
) -> Dispatcher:
    """Over this rank's group of GROUPS[number]; None: over all ranks."""
    members = [list(range(dist.get_world_size()))] if number is None else GROUPS[number]
    group = dist.group.WORLD if number is None else group_of(number)
    hosts = hosts_of(tuple(map(tuple, members))) if kind == "hierarchical" else None
    return build_dispatcher(kind, group, num_experts, layer, clock, hosts, casts=casts)


def both_ways(
    tokens: list[int],
    top_k: int,
    local_experts: int,
    dtype: str,
    skew: float,
    seed: int,
    groups: int = 0,
    kind_of: str = "all_to_all",
    pieces: int = 1,
) -> float:
    """Largest difference between the two dispatchers on this rank, relative to the largest number compared."""
    group, rank = group_of(groups), dist.get_rank()
    num_experts = group.size() * local_experts
    top_k = min(top_k, num_experts)
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    kind = getattr(torch, dtype)
    num_tokens = tokens[rank]
    x = torch.randn(num_tokens, HIDDEN, generator=generator).to(kind)
    weights = torch.rand(num_tokens, top_k, generator=generator)
    # Experts of a token are different; id E marks a pair that must not be computed.
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    scores[:, : max(1, num_experts // 4)] += skew
    ids = scores.topk(top_k, dim=1).indices
    ids = ids.masked_fill(torch.rand(num_tokens, top_k, generator=generator) < 0.2, num_experts)
    all_maps = torch.randn(num_experts, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(kind)
    mine = all_maps[group.rank() * local_experts :][:local_experts]
    out_grad = torch.randn(num_tokens, HIDDEN, generator=generator).to(kind)
    results = []
    for dispatcher in (
        dispatcher_of(kind_of, groups, num_experts, layer=3),
        AllGatherDispatcher(group, num_experts),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, weights, mine)]
        routing = Routing(leaves[1], ids, noise_seed=2**61 + rank)
        outs, counts = [], []
        for departed in dispatcher.begin_dispatch(leaves[0], routing, pieces):
            rows, plan = dispatcher.end_dispatch(departed)
            chunks = rows.split(plan.rows_per_expert.tolist())
            out_rows = torch.cat([chunk @ matrix for chunk, matrix in zip(chunks, leaves[2].unbind(0), strict=True)])
            outs.append(dispatcher.end_combine(dispatcher.begin_combine(out_rows, plan)))
            seeds = torch.tensor(plan.sources.seeds)  # by two hops rows come in another order
            rows_SE = plan.sources.rows_SE[seeds.argsort()].flatten()
            counts.append(torch.cat((plan.rows_per_expert, rows_SE, seeds.sort().values * (not counts))))
        out = torch.cat(outs)
        out.backward(out_grad)
        results.append([sum(counts), out.detach(), *[leaf.grad for leaf in leaves]])
    counts, wanted_counts = results[0][0], results[1][0]
    assert torch.equal(counts, wanted_counts), f"rows per expert, by source, seeds: {counts} != {wanted_counts}"
    worst = 0.0
    for found, wanted in zip(results[0][1:], results[1][1:], strict=True):
        assert found is not None, "a tensor without gradient"
        if wanted.numel():
            scale = float(wanted.float().abs().max()) or 1.0
            worst = max(worst, float((found.float() - wanted.float()).abs().max()) / scale)
    return worst


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    local_experts=st.integers(1, 4),
    top_k=st.integers(1, 4),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    skew=st.sampled_from([0.0, 0.5, 10.0]),
    seed=st.integers(0, 1000),
    groups=st.sampled_from(range(len(GROUPS))),
    kind=st.sampled_from(KINDS),
    pieces=st.sampled_from([1, 2, 3]),
)
def test_all_to_all_equals_all_gather(
    tokens: list[int],
    local_experts: int,
    top_k: int,
    dtype: str,
    skew: float,
    seed: int,
    groups: int,
    kind: str,
    pieces: int,
) -> None:
    """Random tokens per rank (also none), top-k, experts, skew (ranks and experts without a row), both dtypes, and
    groups of ranks side by side, in one piece and in several, some of them empty.

    Planted: reading arrived rows as if they were sorted by expert (no `_Reorder`), and exchanging counts with the whole
    world instead of the group, each turns it red.
    """
    results = run_ranks(both_ways, 4, tokens, top_k, local_experts, dtype, skew, seed, groups, kind, pieces)
    assert max(results) < (1e-5 if dtype == "float32" else 3e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [[0, 0, 0, 0], [5, 0, 0, 0], [0, 3, 0, 7]])
def test_ranks_without_tokens(tokens: list[int], kind: str) -> None:
    """Trap 5: a rank that has nothing to compute takes part in every collective, forward and backward."""
    assert max(run_ranks(both_ways, 4, tokens, 2, 2, "float32", 10.0, 1, 0, kind)) < 1e-5


def out_of_step(odd_rank: int, what: str, kind: str) -> str:
    rank = dist.get_rank()
    layer = 5 if rank == odd_rank and what == "layer" else 4
    hidden = HIDDEN * 2 if rank == odd_rank and what == "hidden" else HIDDEN
    dispatcher = dispatcher_of(kind, None, 8, layer)
    try:
        dispatcher.dispatch(torch.randn(6, hidden), Routing(torch.ones(6, 1), torch.arange(6)[:, None]))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("what", "words"), [("layer", "is at layer 5"), ("hidden", "hidden size 16")])
def test_ranks_out_of_step_are_named(what: str, words: str, kind: str) -> None:
    """Trap 26: counts carry the layer and the width, so every rank fails at once and names the odd one.

    By two hops those notice that meet the odd one in the first, and end: two ranks on two hosts are enough.

    Planted: without the comparison of headers this exchanged rows of different layers without a word.
    """
    ranks, odd = (2, 1) if kind == "hierarchical" else (4, 2)
    messages = run_ranks(out_of_step, ranks, odd, what, kind, timeout=30)
    for rank, message in enumerate(messages):
        assert message, f"rank {rank} noticed nothing"
        if rank != odd:
            assert f"rank {odd}" in message
            assert words in message


def dies(rank: int) -> None:
    if dist.get_rank() == rank:
        raise RuntimeError("told to fail")
    dist.barrier()


def test_helper_shows_every_rank() -> None:
    """A failing rank is named and does not hang the test, though its peers wait in a collective."""
    with pytest.raises(RankFailure, match=r"rank 1: (?s:.)*told to fail"):
        run_ranks(dies, 2, 1, timeout=60)


def test_expert_order() -> None:
    """Chunks (source, expert) become (expert, source); the two orders are inverse."""
    arriving = torch.tensor([[2, 0, 1], [1, 3, 0]])
    order, inverse = expert_order(arriving, 7)
    assert order.tolist() == [0, 1, 3, 4, 5, 6, 2]
    assert order[inverse].tolist() == list(range(7))


def under_autocast(kind: str, casts: bool) -> tuple[list[torch.Tensor], int]:
    """What a token, its gradient, and those of weights and experts are; and bytes sent to the other rank."""
    rank, clock = dist.get_rank(), Clock(torch.device("cpu"))
    generator = torch.Generator().manual_seed(rank)
    dispatcher = dispatcher_of(kind, None, 8, 0, clock, casts)
    x = torch.randn(40, HIDDEN, generator=generator).requires_grad_()
    weights = torch.rand(40, 3, generator=generator).requires_grad_()
    ids = torch.rand(40, 8, generator=generator).topk(3).indices
    torch.manual_seed(5)
    experts = Experts(8, HIDDEN, 16)
    for parameter in experts.parameters():
        parameter.data.normal_()
    experts.shard(4 * rank, 4)
    with torch.autocast("cpu", torch.bfloat16):
        rows, plan = dispatcher.dispatch(x, Routing(weights, ids, complete=True))
        out = dispatcher.combine(experts(rows, plan.rows_per_expert), plan)
    out.float().square().sum().backward()
    found = [out.detach(), x.grad, weights.grad, *(parameter.grad for parameter in experts.parameters())]
    assert all(tensor is not None for tensor in found)
    return [tensor for tensor in found if tensor is not None], clock.take_traffic().bytes_to[1 - rank]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_travel_as_experts_compute(kind: str) -> None:
    """Half the bytes of a dispatch in float32, there and back in backward. By `all_to_all` nothing changes, bit by bit;
    by the others gradients of a token's rows are summed before they are cast, or after."""
    assert Experts(8, HIDDEN, 16).casts_rows
    for (before, wide), (after, narrow) in zip(
        run_ranks(under_autocast, 2, kind, False), run_ranks(under_autocast, 2, kind, True), strict=True
    ):
        assert narrow < 0.8 * wide
        torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
        if kind == "all_to_all":
            torch.testing.assert_close(after, before, rtol=0, atol=0)
        else:
            for one, other in zip(after[1:], before[1:], strict=True):
                assert float((one - other).norm() / other.norm()) < 1e-2
