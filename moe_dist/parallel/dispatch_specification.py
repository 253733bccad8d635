"""The specification of `AllToAllDispatcher`: the same verbs and results by plain gathers (`all_gather`).

Every rank gets every token, and sums come back by reduction, in full precision. Communication grows with the number of
ranks.

Shape suffixes: T tokens, K top-k, D hidden, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_dist.models.moe import AtOnce
from moe_dist.models.noise import Sources
from moe_dist.models.precision import full
from moe_dist.models.recompute import once
from moe_dist.models.routing import Routing
from moe_dist.parallel.comm_timer import Clock


@dataclass(frozen=True)
class AllGatherPlan:
    """Which (token, k) of all tokens each row is, and the routing weights of all tokens."""

    pairs: Tensor
    weights_all: Tensor
    rows_per_expert: Tensor
    tokens_per_rank: list[int]
    sources: Sources | None


class AllGatherDispatcher(AtOnce):
    """Experts are spread in contiguous blocks over the ranks of `group`."""

    def __init__(self, group: ProcessGroup, num_experts: int, layer: int = 0, clock: Clock | None = None) -> None:
        self.group, self.num_experts, self.layer = group, num_experts, layer
        self.clock = clock or Clock(torch.device("cpu"))
        self.ep_size = group.size()
        self.num_local = num_experts // self.ep_size
        self.first = group.rank() * self.num_local

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, AllGatherPlan]:
        """All tokens of the group that chose a local expert, sorted by expert."""
        everyone = self._of_all(x_TD.shape[0], x_TD.device)
        x_all = _AllGather.apply(full(x_TD), everyone, self.group)  # gradients are summed over experts and ranks
        ids_all = _AllGather.apply(routing.expert_ids_TK, everyone, self.group)
        weights_all = _AllGather.apply(routing.weights_TK, everyone, self.group)
        local = ids_all - self.first
        rows, pairs = [], []
        for expert in range(self.num_local):
            token, k = torch.nonzero(local == expert, as_tuple=True)
            rows.append(x_all[token])
            pairs.append(torch.stack((token, k)))
        counts = torch.tensor([len(row) for row in rows], device=x_TD.device)
        sources = None
        if routing.noise_seed is not None:
            mine = [(ids == expert).sum() for ids in local.split(everyone) for expert in range(self.num_local)]
            rows_SE = torch.stack(mine).view(len(everyone), self.num_local)
            sources = Sources(rows_SE, self._of_all(routing.noise_seed, x_TD.device))
        return torch.cat(rows).to(x_TD.dtype), AllGatherPlan(
            torch.cat(pairs, dim=1), weights_all, counts, everyone, sources
        )

    def _of_all(self, number: int, device: torch.device) -> list[int]:
        """This rank's number and those of its peers: asked once, also where the pass is repeated."""
        with self.clock.measure(self.layer):
            return once(lambda: _gather_number(number, self.group, device))

    def combine(self, rows_RD: Tensor, plan: AllGatherPlan) -> Tensor:
        """Weighted rows summed into the tokens of every rank; each rank keeps its own."""
        token, k = plan.pairs
        total = sum(plan.tokens_per_rank)
        weights_R = plan.weights_all[token, k]
        # Rounded as the rows are, while their gradients stay exact.
        weights_R = weights_R + (weights_R.to(rows_RD.dtype).to(weights_R.dtype) - weights_R).detach()
        weighted = full(rows_RD) * weights_R[:, None]
        out = weighted.new_zeros(total, rows_RD.shape[1]).index_add(0, token, weighted)
        return _ReduceScatter.apply(out, plan.tokens_per_rank, self.group).to(rows_RD.dtype)


def _gather_number(number: int, group: ProcessGroup, device: torch.device) -> list[int]:
    numbers = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    dist.all_gather(numbers, torch.tensor([number], device=device), group=group)
    return [int(item) for item in numbers]


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
