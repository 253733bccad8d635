"""The specification of `AllToAllDispatcher`: the same verbs and results by plain gathers. For tests.

Every rank gets every token, and sums come back by reduction; communication grows with the number of ranks.

Shape suffixes: T tokens, K top-k, D hidden, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_dist.models.noise import Sources
from moe_dist.models.router import Routing


@dataclass(frozen=True)
class AllGatherPlan:
    """Which (token, k) of all tokens each row is, and the routing weights of all tokens."""

    pairs: Tensor
    weights_all: Tensor
    rows_per_expert: Tensor
    tokens_per_rank: list[int]
    sources: Sources | None


class AllGatherDispatcher:
    """Experts are spread in contiguous blocks over the ranks of `group`."""

    def __init__(self, group: ProcessGroup, num_experts: int) -> None:
        self.group, self.num_experts = group, num_experts
        self.num_local = num_experts // group.size()
        self.first = group.rank() * self.num_local

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, AllGatherPlan]:
        """All tokens of the group that chose a local expert, sorted by expert."""
        everyone = _gather_sizes(x_TD.shape[0], self.group)
        x_all = _AllGather.apply(x_TD, everyone, self.group)
        ids_all = _AllGather.apply(routing.expert_ids_TK, everyone, self.group)
        weights_all = _AllGather.apply(routing.weights_TK, everyone, self.group)
        local = ids_all - self.first
        rows, pairs = [], []
        for expert in range(self.num_local):
            token, k = torch.nonzero(local == expert, as_tuple=True)
            rows.append(x_all[token])
            pairs.append(torch.stack((token, k)))
        counts = torch.tensor([len(row) for row in rows])
        sources = None
        if routing.noise_seed is not None:
            mine = [(ids == expert).sum() for ids in local.split(everyone) for expert in range(self.num_local)]
            rows_SE = torch.stack(mine).view(len(everyone), self.num_local)
            sources = Sources(rows_SE, _gather_sizes(routing.noise_seed, self.group))
        return torch.cat(rows), AllGatherPlan(torch.cat(pairs, dim=1), weights_all, counts, everyone, sources)

    def combine(self, rows_RD: Tensor, plan: AllGatherPlan) -> Tensor:
        """Weighted rows summed into the tokens of every rank; each rank keeps its own."""
        token, k = plan.pairs
        total = sum(plan.tokens_per_rank)
        weighted = rows_RD * plan.weights_all[token, k].to(rows_RD.dtype)[:, None]
        out = rows_RD.new_zeros(total, rows_RD.shape[1]).index_add(0, token, weighted)
        return _ReduceScatter.apply(out, plan.tokens_per_rank, self.group)


def _gather_sizes(size: int, group: ProcessGroup) -> list[int]:
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([size]), group=group)
    return [int(item) for item in sizes]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
        ctx.arguments = (sizes, group)
        parts = [x.new_zeros(max(sizes), *x.shape[1:]) for _ in sizes]
        padded = torch.cat((x, x.new_zeros(max(sizes) - x.shape[0], *x.shape[1:])))
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        sizes, group = ctx.arguments
        return _ReduceScatter.apply(grads[0], sizes, group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
        ctx.arguments = (sizes, group)
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _AllGather.apply(grads[0], *ctx.arguments), None, None
