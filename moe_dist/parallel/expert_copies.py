"""Hot experts computed by every rank of their group for its own tokens, which do not travel.

A weight has one owner, as without: the optimizer, ZeRO and checkpoints know of no copies. In every forward pass copies
come from there, and in backward the gradients of all ranks go back and are summed into the owner's. What experts get
then differs by rounding alone. FasterMoE calls it shadowing (He et al. 2022, https://doi.org/10.1145/3503221.3508418).

Shape suffixes: T tokens, K top-k, D hidden, F intermediate, E experts, e on a rank, C copies, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from moe_dist.models.experts import CopiedRows
from moe_dist.models.moe import LocalDispatcher, Staying
from moe_dist.models.routing import Routing
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.row_exchange import Route, RowExchange


class ExpertCopies:
    """The experts of one layer that all ranks of `group` compute, none at first. They change between steps only, on all
    ranks alike: a repeated forward pass finds the same."""

    def __init__(
        self,
        group: ProcessGroup,
        num_experts: int,
        layer: int,
        clock: Clock | None = None,
        *,
        device: torch.device,
        kernels: str = "torch",
    ) -> None:
        self.group, self.num_experts, self.layer = group, num_experts, layer
        self.clock, self.device, self.kernels = clock or Clock(torch.device("cpu")), device, kernels
        self.slots: Sequence[int] = range(num_experts)
        self.set_experts(())

    def set_experts(self, experts: Sequence[int]) -> None:
        """From now on these, by id, are computed by every rank."""
        slot_of = {expert: slot for slot, expert in enumerate(self.slots)}
        share = self.num_experts // self.group.size()
        self.experts = sorted(experts, key=lambda expert: slot_of[expert])  # in which order they come from their owners
        index = torch.full((self.num_experts + 1,), len(self.experts), device=self.device)
        index[self.experts] = torch.arange(len(self.experts), device=self.device)
        self.index_of_expert = index
        """(E + 1,) int64: which copy an expert has; C: none."""
        owners = [slot_of[expert] // share for expert in self.experts]
        self.from_rank = [owners.count(rank) for rank in range(self.group.size())]
        mine = [slot_of[expert] % share for expert in self.experts if slot_of[expert] // share == self.group.rank()]
        self.places = torch.tensor(mine, dtype=torch.int64, device=self.device)
        """Of those that this rank owns, in its stacks."""

    def set_slots(self, slots: Sequence[int]) -> None:
        """Expert `slots[s]` is in slot s, which is rank s // e's."""
        self.slots = slots
        self.set_experts(self.experts)

    def keep(self, x_TD: Tensor, routing: Routing) -> tuple[Staying | None, Routing]:
        """What stays on this rank, and what is left to be dispatched."""
        if not self.experts:
            return None, routing
        count, ids_TK = len(self.experts), routing.expert_ids_TK
        index_TK = self.index_of_expert[ids_TK]
        dispatcher = LocalDispatcher(count, self.kernels)
        rows_RD, plan = dispatcher.dispatch(x_TD, replace(routing, expert_ids_TK=index_TK, complete=False))
        me, size = self.group.rank(), self.group.size()
        self.clock.count_rows([len(rows_RD) * (rank == me) for rank in range(size)], len(rows_RD))
        route = Route(self.from_rank, [len(self.places)] * size, self.group, self.clock, self.layer, "dispatch")
        rows = CopiedRows(rows_RD, plan.rows_per_expert, CopiedWeights(RowExchange(route), self.places))
        others_TK = ids_TK.masked_fill(index_TK < count, self.num_experts)
        return Staying(rows, dispatcher, plan), replace(routing, expert_ids_TK=others_TK, complete=False)


class CopiedWeights:
    """Copies of one forward pass: weights of `places` here go to every rank, and gradients come back from all."""

    def __init__(self, exchange: RowExchange, places: Tensor) -> None:
        self.exchange, self.places = exchange, places

    def depart(self, w_gate_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stacks (e, D, 2F) and (e, F, D) as they are to be used by their own rows, and copies on their way."""
        self.shapes = w_gate_up.shape[1:], w_down.shape[1:]
        size = len(self.exchange.route.send_splits)
        gate_up, down, sent = _Picked.apply(w_gate_up, w_down, self.places, size)
        return gate_up, down, self.exchange.depart(sent)

    def arrive(self, departed: Tensor) -> tuple[Tensor, Tensor]:
        """(C, D, 2F) and (C, F, D), in the order of their slots."""
        copies = self.exchange.arrive(departed)
        parts = copies.split([shape.numel() for shape in self.shapes], dim=1)
        gate_up, down = (part.view(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True))
        return gate_up, down


def sum_over_ranks(grads: Tensor, num_ranks: int) -> Tensor:
    """Gradients of this rank's experts, those of rank 0 before those of rank 1: their sum, in that order."""
    return grads.view(num_ranks, grads.shape[0] // num_ranks, grads.shape[1]).sum(0)


class _Picked(torch.autograd.Function):
    """Stacks, and behind them some of their experts once for each rank, a row each. In backward the gradients of these
    are added to the stacks' own where they are: a stack of zeros for them would cost more than the sum."""

    @staticmethod
    def forward(
        ctx: Any, w_gate_up: Tensor, w_down: Tensor, places: Tensor, num_ranks: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.places, ctx.num_ranks = places, num_ranks
        picked = [stack.index_select(0, places).flatten(1) for stack in (w_gate_up, w_down)]
        sent = torch.cat(picked, dim=1).repeat(num_ranks, 1)
        return w_gate_up.view_as(w_gate_up), w_down.view_as(w_down), sent

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_gate_up: Tensor, grad_down: Tensor, grad_sent: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        stacks = grad_gate_up, grad_down
        summed = sum_over_ranks(grad_sent, ctx.num_ranks).split([stack[0].numel() for stack in stacks], dim=1)
        for stack, part in zip(stacks, summed, strict=True):
            stack[ctx.places] += part.view(-1, *stack.shape[1:])
        return grad_gate_up, grad_down, None, None
