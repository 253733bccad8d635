"""Tokens to experts on other ranks and back, a row for each expert of a token.

Shape suffixes: T tokens, K top-k, D hidden, E experts, e = E / ep experts on this rank, R rows received.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_dist.models.noise import Sources
from moe_dist.models.permute import Permutation, rows_from_tokens, sort_by_expert, tokens_from_rows
from moe_dist.models.recompute import once
from moe_dist.models.routing import Routing
from moe_dist.parallel.comm_timer import Clock, Way
from moe_dist.parallel.row_exchange import Route, RowExchange, exchange_headers


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


@dataclass(frozen=True)
class UnderWay:
    """A piece whose rows are on their way to experts, or home."""

    rows: Tensor
    exchange: RowExchange
    plan: AllToAllPlan


class SpreadExperts(ABC):
    """What every dispatcher knows whose experts are spread in contiguous blocks over the ranks of `group`.

    `casts`: they begin by casting rows to the dtype of autocast, so rows are cast before they travel. `kernels`: by
    which rows are moved here (`train.kernels`).
    """

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
        self.group, self.num_experts, self.layer = group, num_experts, layer
        self.casts, self.kernels = casts, kernels
        self.ep_size = group.size()
        if num_experts % self.ep_size:
            raise ValueError(f"ep_size={self.ep_size}: must divide num_experts={num_experts}")
        self.num_local = num_experts // self.ep_size
        self.clock = clock or Clock(torch.device("cpu"))

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Any]:
        """Both halves, one after the other, of all tokens at once."""
        (departed,) = self.begin_dispatch(x_TD, routing)
        return self.end_dispatch(departed)

    def combine(self, rows_RD: Tensor, plan: Any) -> Tensor:
        """Both halves, one after the other."""
        return self.end_combine(self.begin_combine(rows_RD, plan))

    @abstractmethod
    def begin_dispatch(self, x_TD: Tensor, routing: Routing, num_pieces: int = 1) -> list[Any]: ...

    @abstractmethod
    def end_dispatch(self, departed: Any) -> tuple[Tensor, Any]: ...

    @abstractmethod
    def begin_combine(self, rows_RD: Tensor, plan: Any) -> Any: ...

    @abstractmethod
    def end_combine(self, returning: Any) -> Tensor: ...


class AllToAllDispatcher(SpreadExperts):
    """Experts are spread in contiguous blocks over the ranks of `group`.

    `begin_dispatch` sorts the pairs of each piece by global expert, tells every peer how many rows come for each of its
    experts (one small all-to-all and the layer's one host synchronisation), then sends the rows with uneven splits. Any
    rank may send or receive nothing. `layer` travels with the counts, so ranks that fell out of step fail at once,
    by name, instead of reading each other's rows; so does the seed of the noise that experts draw for the rows.
    """

    _HEADER = 3  # layer, hidden size, seed of noise; then for each piece rows for this peer, and for its experts

    def begin_dispatch(self, x_TD: Tensor, routing: Routing, num_pieces: int = 1) -> list[UnderWay]:
        """(T, D): pieces of the tokens set out, one after the other."""
        seed = routing.noise_seed
        pieces = split_tokens(x_TD, routing, num_pieces)
        permutations = [
            sort_by_expert(piece.expert_ids_TK, self.num_experts, None, self.kernels) for _, piece in pieces
        ]
        arriving_NPE, send, receive, seeds = once(lambda: self._exchange_counts(permutations, x_TD.shape[1], seed or 0))
        departed = []
        for number, ((x, piece), permutation) in enumerate(zip(pieces, permutations, strict=True)):
            arriving = arriving_NPE[number]
            sent = sum(send[number])
            if sent < permutation.num_rows:  # pairs without an expert sort to the end
                pair_of_row = permutation.pair_of_row[:sent]
                permutation = replace(permutation, pair_of_row=pair_of_row, every_pair_has_a_row=False)
            sources = None if seed is None else Sources(arriving, seeds)
            splits = send[number], receive[number]
            departed.append(self._depart(x, piece.weights_TK, permutation, *splits, arriving, sources))
        return departed

    def _depart(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        permutation: Permutation,
        send_splits: list[int],
        receive_splits: list[int],
        arriving: Tensor,
        sources: Sources | None,
    ) -> UnderWay:
        """Rows set out. `arriving` (ep, e): those that come from each peer for each local expert."""
        self.clock.count_rows(send_splits, sum(receive_splits))
        arrival_of_row, row_of_arrival = expert_order(arriving, sum(receive_splits))
        plan = AllToAllPlan(
            permutation,
            weights_TK,
            send_splits,
            receive_splits,
            arrival_of_row,
            row_of_arrival,
            rows_per_expert=arriving.sum(0),
            sources=sources,
        )
        exchange = self._exchange(receive_splits, send_splits, "dispatch")
        rows = exchange.depart(as_it_travels(rows_from_tokens(x_TD, permutation), self.casts))
        return UnderWay(rows, exchange, plan)

    def end_dispatch(self, departed: UnderWay) -> tuple[Tensor, AllToAllPlan]:
        """(R, D) rows of all peers for this rank's experts, sorted by local expert, and the plan."""
        plan, arrived_RD = departed.plan, departed.exchange.arrive(departed.rows)
        return _Reorder.apply(arrived_RD, plan.arrival_of_row, plan.row_of_arrival), plan

    def begin_combine(self, rows_RD: Tensor, plan: AllToAllPlan) -> UnderWay:
        """(R, D): rows set out for home."""
        exchange = self._exchange(plan.send_splits, plan.receive_splits, "combine")
        rows = exchange.depart(_Reorder.apply(rows_RD, plan.row_of_arrival, plan.arrival_of_row))
        return UnderWay(rows, exchange, plan)

    def end_combine(self, returning: UnderWay) -> Tensor:
        """(T, D): rows are weighted by their routing weights and summed over k in order."""
        plan = returning.plan
        return tokens_from_rows(returning.exchange.arrive(returning.rows), plan.weights_TK, plan.permutation)

    def _exchange(self, receive_splits: list[int], send_splits: list[int], way: Way) -> RowExchange:
        return RowExchange(Route(receive_splits, send_splits, self.group, self.clock, self.layer, way))

    def _exchange_counts(
        self, permutations: list[Permutation], hidden_size: int, seed: int
    ) -> tuple[Tensor, list[list[int]], list[list[int]], list[int]]:
        """Rows of each piece arriving from each peer for each local expert (N, ep, e) int64; rows of each piece sent to
        and received from peers; the seeds of peers."""
        count = len(permutations)
        counts = torch.stack([one.rows_per_expert.view(self.ep_size, -1) for one in permutations], dim=1)
        totals = counts.sum(2)
        header = totals.new_tensor([self.layer, hidden_size, seed]).expand(self.ep_size, self._HEADER)
        outgoing = torch.cat((header, totals, counts.flatten(1)), dim=1).contiguous()
        incoming = exchange_headers(outgoing, self.group, self.clock, self.layer)
        arriving = incoming[:, self._HEADER + count :].view(self.ep_size, count, -1)
        checks = torch.cat((incoming[:, : self._HEADER + count], arriving.sum(2), totals), dim=1).tolist()
        check_peers(checks, self.group, self.layer, hidden_size)
        announced = [row[self._HEADER :] for row in checks]
        for peer, numbers in enumerate(announced):
            if numbers[:count] != numbers[count : 2 * count]:
                raise DispatchMismatchError(
                    f"expert dispatch in layer {self.layer}: rank {dist.get_global_rank(self.group, peer)} announced "
                    f"{numbers[:count]} rows as {numbers[count : 2 * count]}. The ranks run different models or fell "
                    "out of step."
                )
        receive = [[numbers[piece] for numbers in announced] for piece in range(count)]
        send = [[numbers[2 * count + piece] for numbers in announced] for piece in range(count)]
        return arriving.transpose(0, 1), send, receive, [row[2] for row in checks]


def split_tokens(x_TD: Tensor, routing: Routing, num_pieces: int) -> list[tuple[Tensor, Routing]]:
    """Neighbouring tokens with what was decided for them, in so many pieces of about the same size, some empty."""
    if num_pieces == 1:
        return [(x_TD, routing)]
    size, more = divmod(x_TD.shape[0], num_pieces)
    sizes = [size + (number < more) for number in range(num_pieces)]
    parts = zip(x_TD.split(sizes), routing.expert_ids_TK.split(sizes), routing.weights_TK.split(sizes), strict=True)
    return [(x, Routing(weights, ids, noise_seed=routing.noise_seed)) for x, ids, weights in parts]


def as_it_travels(rows: Tensor, casts: bool) -> Tensor:
    """Rows in the dtype in which experts will compute, where that is known to be all they do with them."""
    kind = rows.device.type
    return rows.to(torch.get_autocast_dtype(kind)) if casts and torch.is_autocast_enabled(kind) else rows


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


class _Reorder(torch.autograd.Function):
    """rows[order]; `inverse` makes backward a gather too, instead of a scatter-add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.inverse), None, None
