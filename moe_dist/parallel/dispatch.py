"""Tokens to experts on other ranks and back: the only file that calls an all-to-all.

Shape suffixes: T tokens, K top-k, D hidden, E experts, e = E / ep experts on this rank, R rows received.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_dist.models.noise import Sources
from moe_dist.models.permute import Permutation, rows_from_tokens, sort_by_expert, tokens_from_rows
from moe_dist.models.recompute import once
from moe_dist.models.router import Routing
from moe_dist.parallel.comm_timer import Clock, Way


class DispatchMismatchError(RuntimeError):
    """Two ranks of an expert-parallel group are not at the same layer, or do not agree on sizes."""


@dataclass(frozen=True)
class AllToAllPlan:
    """How this rank's pairs travelled. Rows arrive ordered by (source rank, expert); experts want (expert, source).

    `arrival_of_row` (R,): which arrived row is row r of the expert order; `row_of_arrival` is its inverse.
    """

    permutation: Permutation
    weights_TK: Tensor
    send_splits: list[int]
    receive_splits: list[int]
    arrival_of_row: Tensor
    row_of_arrival: Tensor
    rows_per_expert: Tensor
    sources: Sources | None


class SpreadExperts:
    """What every dispatcher knows whose experts are spread in contiguous blocks over the ranks of `group`.

    `casts`: they begin by casting rows to the dtype of autocast, so rows are cast before they travel.
    """

    def __init__(
        self, group: ProcessGroup, num_experts: int, layer: int, clock: Clock | None = None, *, casts: bool = False
    ) -> None:
        self.group, self.num_experts, self.layer, self.casts = group, num_experts, layer, casts
        self.ep_size = group.size()
        if num_experts % self.ep_size:
            raise ValueError(f"ep_size={self.ep_size}: must divide num_experts={num_experts}")
        self.num_local = num_experts // self.ep_size
        self.clock = clock or Clock(torch.device("cpu"))


class AllToAllDispatcher(SpreadExperts):
    """Experts are spread in contiguous blocks over the ranks of `group`.

    `dispatch` sorts this rank's pairs by global expert, tells every peer how many rows come for each of its experts
    (one small all-to-all and the layer's one host synchronisation), then sends the rows with uneven splits. Any
    rank may send or receive nothing. `layer` travels with the counts, so ranks that fell out of step fail at once,
    by name, instead of reading each other's rows; so does the seed of the noise that experts draw for the rows.
    """

    _HEADER = 4  # layer, hidden size, seed of noise, rows for this peer

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, AllToAllPlan]:
        """(T, D) -> (R, D) rows of all peers for this rank's experts, sorted by local expert, and the plan."""
        permutation = sort_by_expert(routing.expert_ids_TK, self.num_experts, None)
        seed = routing.noise_seed
        arriving, send_splits, receive_splits, seeds = once(
            lambda: self._exchange_counts(permutation, x_TD.shape[1], seed or 0)
        )
        sent = sum(send_splits)
        self.clock.count_rows(send_splits, sum(receive_splits))
        if sent < permutation.num_rows:  # pairs without an expert sort to the end
            permutation = replace(permutation, pair_of_row=permutation.pair_of_row[:sent], every_pair_has_a_row=False)
        arrival_of_row, row_of_arrival = expert_order(arriving, sum(receive_splits))
        plan = AllToAllPlan(
            permutation,
            routing.weights_TK,
            send_splits,
            receive_splits,
            arrival_of_row,
            row_of_arrival,
            rows_per_expert=arriving.sum(0),
            sources=None if seed is None else Sources(arriving, seeds),
        )
        sorted_rows = as_it_travels(rows_from_tokens(x_TD, permutation), self.casts)
        arrived_RD = AllToAll.apply(
            sorted_rows, receive_splits, send_splits, self.group, self.clock, self.layer, "dispatch"
        )
        return _Reorder.apply(arrived_RD, arrival_of_row, row_of_arrival), plan

    def combine(self, rows_RD: Tensor, plan: AllToAllPlan) -> Tensor:
        """(R, D) -> (T, D): rows go home, are weighted by their routing weights and summed over k in order."""
        arrived_RD = _Reorder.apply(rows_RD, plan.row_of_arrival, plan.arrival_of_row)
        sorted_rows = AllToAll.apply(
            arrived_RD, plan.send_splits, plan.receive_splits, self.group, self.clock, self.layer, "combine"
        )
        return tokens_from_rows(sorted_rows, plan.weights_TK, plan.permutation)

    def _exchange_counts(
        self, permutation: Permutation, hidden_size: int, seed: int
    ) -> tuple[Tensor, list[int], list[int], list[int]]:
        """Rows arriving from each peer for each local expert (ep, e) int64; rows sent to and received from peers, and
        their seeds."""
        counts = permutation.rows_per_expert.view(self.ep_size, -1)
        totals = counts.sum(1, keepdim=True)
        header = totals.new_tensor([self.layer, hidden_size, seed]).expand(self.ep_size, 3)
        outgoing = torch.cat((header, totals, counts), dim=1).contiguous()
        incoming = exchange_headers(outgoing, self.group, self.clock, self.layer)
        arriving = incoming[:, self._HEADER :]
        checks = torch.cat((incoming[:, : self._HEADER], arriving.sum(1, keepdim=True), totals), dim=1).tolist()
        check_peers(checks, self.group, self.layer, hidden_size)
        for peer, (_, _, _, total, received, _) in enumerate(checks):
            if total != received:
                raise DispatchMismatchError(
                    f"expert dispatch in layer {self.layer}: rank {dist.get_global_rank(self.group, peer)} announced "
                    f"{total} rows as {received}. The ranks run different models or fell out of step."
                )
        return arriving, [row[5] for row in checks], [row[3] for row in checks], [row[2] for row in checks]


def as_it_travels(rows: Tensor, casts: bool) -> Tensor:
    """Rows in the dtype in which experts will compute, where that is known to be all they do with them."""
    kind = rows.device.type
    return rows.to(torch.get_autocast_dtype(kind)) if casts and torch.is_autocast_enabled(kind) else rows


def exchange_headers(outgoing: Tensor, group: ProcessGroup, clock: Clock, layer: int) -> Tensor:
    """Row p of `outgoing` (ep, n) goes to peer p; row p of the answer has come from it."""
    incoming = torch.empty_like(outgoing)
    clock.count([1] * group.size(), outgoing[0].nbytes, group)
    with clock.measure(layer):
        dist.all_to_all_single(incoming, outgoing, group=group)
    return incoming


def check_peers(headers: list[list[int]], group: ProcessGroup, layer: int, hidden_size: int) -> None:
    """Raises DispatchMismatchError naming who is elsewhere. `headers`: of every peer layer, hidden size, and more."""
    for peer, (at, hidden, *_) in enumerate(headers):
        if (at, hidden) != (layer, hidden_size):
            raise DispatchMismatchError(
                f"expert dispatch in layer {layer}: rank {dist.get_global_rank(group, peer)} is at layer {at} with "
                f"hidden size {hidden}; expected layer {layer}, hidden size {hidden_size}. The ranks run different "
                "models or fell out of step."
            )


def expert_order(arriving: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """From (source, expert) to (expert, source) order, for `arriving` (ep, e) counts that sum to `num_rows`.

    Returns `arrival_of_row` and its inverse `row_of_arrival`, both (num_rows,) int64. No host synchronisation.
    """
    chunk_sizes = arriving.flatten()
    chunk_starts = (chunk_sizes.cumsum(0) - chunk_sizes).view_as(arriving).t().flatten()
    sizes = arriving.t().flatten()
    new_starts = sizes.cumsum(0) - sizes
    shift = torch.repeat_interleave(chunk_starts - new_starts, sizes, output_size=num_rows)
    rows = torch.arange(num_rows, device=arriving.device)
    arrival_of_row = rows + shift
    row_of_arrival = torch.empty_like(rows).scatter_(0, arrival_of_row, rows)
    return arrival_of_row, row_of_arrival


def exchange_rows(
    received: Tensor, rows: Tensor, receive_splits: list[int], send_splits: list[int], group: ProcessGroup
) -> None:
    """Uneven all-to-all of contiguous rows.

    On gloo as messages to and from each peer, all under way at once: its own uneven all-to-all sends to one peer at a
    time and does not receive meanwhile, so that a link carries one direction after the other.
    """
    if dist.get_backend(group) != "gloo" or rows.device.type != "cpu":  # its messages know no other memory
        dist.all_to_all_single(received, rows, receive_splits, send_splits, group=group)
        return
    me, works = group.rank(), []
    incoming, outgoing = received.split(receive_splits), rows.split(send_splits)
    for step in range(1, group.size()):
        source, target = (me - step) % group.size(), (me + step) % group.size()
        # Empty ones too: by the number of its calls a rank is known that keeps the others waiting.
        works.append(dist.irecv(incoming[source], group=group, group_src=source))
        works.append(dist.isend(outgoing[target], group=group, group_dst=target))
    incoming[me].copy_(outgoing[me])
    for work in works:
        assert work is not None
        work.wait()


class AllToAll(torch.autograd.Function):
    """Rows to peers with uneven splits; backward sends gradients the same way back."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        receive_splits: list[int],
        send_splits: list[int],
        group: ProcessGroup,
        clock: Clock,
        layer: int,
        way: Way,
    ) -> Tensor:
        ctx.arguments = (send_splits, receive_splits, group, clock, layer, way)
        received = rows.new_empty(sum(receive_splits), rows.shape[1])
        clock.count(send_splits, rows.shape[1] * rows.element_size(), group)
        with clock.measure(layer, way):
            exchange_rows(received, rows.contiguous(), receive_splits, send_splits, group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        return AllToAll.apply(grads[0], *ctx.arguments), None, None, None, None, None, None


class _Reorder(torch.autograd.Function):
    """rows[order]; `inverse` makes backward a gather too, instead of a scatter-add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.inverse), None, None
