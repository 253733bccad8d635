"""Dispatch by the kernels of DeepEP (the package `deep_ep`), which move tokens over NVLink and RDMA.

As with `dedup` a token goes once to each rank that has any of its experts, and one sum comes back; forward and backward
are each other's reverse: the gradient of a dispatch is a combine, and the other way round. Unmeasured: no pair of GPUs
was to be had; the code runs in tests with a stand-in of the same interface.

Shape suffixes: T tokens, K top-k, D hidden, E experts, A rows that arrive, R rows of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from moe_dist.models.permute import Permutation, rows_from_tokens, sort_by_expert, tokens_from_rows
from moe_dist.models.router import Routing
from moe_dist.parallel.comm_timer import Clock, Way
from moe_dist.parallel.dispatch import SpreadExperts, as_it_travels
from moe_dist.parallel.dispatch_choice import require_installed


@cache
def _shared_buffer(group: ProcessGroup, row_bytes: int) -> Any:
    """One of all layers: it holds much of a device's memory."""
    import deep_ep

    buffer, size = deep_ep.Buffer, group.size()
    configs = [buffer.get_dispatch_config(size), buffer.get_combine_config(size)]
    nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs)
    return buffer(group, nvlink, rdma)


class _Exchange:
    """The way of one micro-batch in one layer. `handle` is DeepEP's word for it, known once tokens have travelled."""

    def __init__(self, buffer: Any, num_experts: int, clock: Clock, layer: int) -> None:
        self.buffer, self.num_experts, self.clock, self.layer = buffer, num_experts, clock, layer
        self.handle: Any = None
        self.pairs_here = 0

    def out(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(A, D) tokens that have come, (A, K) their experts here, -1 for those elsewhere, and (A, K) weights, of
        experts elsewhere 0."""
        with self.clock.measure(self.layer, "dispatch"):
            per_rank, per_rdma_rank, per_expert, is_token_in_rank, _ = self.buffer.get_dispatch_layout(
                ids_TK, self.num_experts
            )
            rows_AD, local_AK, weights_AK, rows_per_expert, self.handle, _ = self.buffer.dispatch(
                x_TD,
                topk_idx=ids_TK,
                topk_weights=weights_TK,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=is_token_in_rank,
                num_tokens_per_expert=per_expert,
            )
        self.pairs_here = sum(rows_per_expert)
        self.clock.count_rows(per_expert.view(len(per_rank), -1).sum(1).tolist(), self.pairs_here)
        return rows_AD, local_AK, weights_AK

    def out_again(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (A, D), the same way."""
        with self.clock.measure(self.layer, "combine"):
            return self.buffer.dispatch(x_TD.contiguous(), handle=self.handle)[0]

    def home(self, rows_AD: Tensor, weights_AK: Tensor | None, way: Way) -> tuple[Tensor, Tensor | None]:
        """(T, D) sums over ranks, and of the (A, K) numbers beside rows (T, K)."""
        weights_AK = None if weights_AK is None else weights_AK.contiguous()
        with self.clock.measure(self.layer, way):
            sums_TD, sums_TK, _ = self.buffer.combine(rows_AD.contiguous(), self.handle, topk_weights=weights_AK)
        return sums_TD, sums_TK


@dataclass(frozen=True)
class DeepEPPlan:
    """How tokens travelled, and what became of those that came: row that came -> rows by local expert, with weights."""

    exchange: _Exchange
    to_experts: Permutation
    weights_AK: Tensor
    sources: None = None

    @property
    def rows_per_expert(self) -> Tensor:
        return self.to_experts.rows_per_expert


class DeepEPDispatcher(SpreadExperts):
    """Experts are spread in contiguous blocks over the ranks of `group`; there is one piece. Raises ConfigError where
    the package is not installed."""

    def __init__(
        self,
        group: ProcessGroup,
        num_experts: int,
        layer: int,
        clock: Clock | None = None,
        *,
        casts: bool = False,
        kernels: str = "torch",
    ) -> None:
        require_installed("deepep")
        super().__init__(group, num_experts, layer, clock, casts=casts, kernels=kernels)

    def begin_dispatch(self, x_TD: Tensor, routing: Routing, num_pieces: int = 1) -> list[tuple[Tensor, DeepEPPlan]]:
        if routing.noise_seed is not None:
            raise ValueError(
                "parallel.dispatcher=deepep: it does not tell whose the rows of an expert are, which noise of experts "
                "(dropout) depends on; take parallel.dispatcher=auto, or set their dropout to 0"
            )
        x_TD = as_it_travels(x_TD, self.casts).contiguous()
        buffer = _shared_buffer(self.group, x_TD.shape[1] * max(2, x_TD.element_size()))
        exchange = _Exchange(buffer, self.num_experts, self.clock, self.layer)
        ids_TK = routing.expert_ids_TK.masked_fill(routing.expert_ids_TK == self.num_experts, -1)
        rows_AD, weights_AK, local_AK = _Dispatch.apply(x_TD, routing.weights_TK, ids_TK, exchange)
        local_AK = local_AK.to(torch.int64).masked_fill(local_AK < 0, self.num_local)
        to_experts = sort_by_expert(local_AK, self.num_local, exchange.pairs_here, self.kernels)
        return [(rows_from_tokens(rows_AD, to_experts), DeepEPPlan(exchange, to_experts, weights_AK))]

    def end_dispatch(self, departed: tuple[Tensor, DeepEPPlan]) -> tuple[Tensor, DeepEPPlan]:
        return departed

    def begin_combine(self, rows_RD: Tensor, plan: DeepEPPlan) -> Tensor:
        """(R, D) -> (T, D): weighted and summed over the experts of each rank where they are, over ranks at home."""
        sums_AD = tokens_from_rows(rows_RD, plan.weights_AK, plan.to_experts)
        return _Combine.apply(sums_AD, plan.exchange)

    def end_combine(self, returning: Tensor) -> Tensor:
        return returning


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, exchange: _Exchange
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.exchange = exchange
        rows_AD, local_AK, weights_AK = exchange.out(x_TD, ids_TK, weights_TK.contiguous())
        ctx.mark_non_differentiable(local_AK)
        return rows_AD, weights_AK, local_AK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        return *ctx.exchange.home(grads[0], grads[1], "dispatch"), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums_AD: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.home(sums_AD, None, "combine")[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.out_again(grads[0]), None
