"""Deduplicated dispatch: a token goes once to each rank that holds any of its experts, and one sum comes back.

With top-8 of 64 experts on two ranks a token has four pairs on the other rank, and one row instead of four travels each
way. Its expert ids and routing weights travel with it; the receiver hands it to its experts and sums what they answer.

Hierarchical: once to each host, to the rank there with the same local rank as its own, and from there once to each
rank. A token with experts on three ranks of another host crosses the network once. Each way it is summed where ways
part.

Shape suffixes: T tokens, K top-k, D hidden, E experts, A rows that arrive, R rows of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_dist.models.noise import Sources
from moe_dist.models.permute import Permutation, count_ids, rows_from_tokens, sort_by_expert, tokens_from_rows
from moe_dist.models.routing import Routing
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.dispatch import SpreadExperts, split_tokens
from moe_dist.parallel.dispatch_hop import Arrived, Departed, Hop, Load, Origins, Way
from moe_dist.parallel.row_exchange import RowExchange


@dataclass(frozen=True)
class DedupPlan:
    """How this rank's tokens travelled, hop by hop, and what became of those that came: row that came -> rows by local
    expert, with its routing weights."""

    ways: tuple[Way, ...]
    to_experts: Permutation
    weights_AK: Tensor
    sources: Sources | None

    @property
    def rows_per_expert(self) -> Tensor:
        return self.to_experts.rows_per_expert


@dataclass(frozen=True)
class _Travelling:
    """A piece on its first hop."""

    piece: Departed
    draws_noise: bool


class DedupDispatcher(SpreadExperts):
    """Experts are spread in contiguous blocks over the ranks of `group`; the same verbs and gradients as
    `AllToAllDispatcher`, whose sums over k it makes in parts: over the experts of a rank there, over ranks here.
    """

    @cached_property
    def hops(self) -> list[Hop]:
        """The way to the rank of an expert."""
        return [self._hop(self.group, self.num_experts)]

    def _hop(self, group: ProcessGroup, num_experts: int) -> Hop:
        return Hop(group, num_experts, self.layer, self.clock, self.casts, self.kernels)

    def begin_dispatch(self, x_TD: Tensor, routing: Routing, num_pieces: int = 1) -> list[_Travelling]:
        """(T, D): pieces of the tokens set out on the first hop, one after the other."""
        seed = routing.noise_seed
        ranks = routing.expert_ids_TK.flatten().div(self.num_local, rounding_mode="floor")  # those of E: rank ep
        pieces = split_tokens(x_TD, routing, num_pieces)
        loads = [
            Load(x, piece.expert_ids_TK, piece.weights_TK, Origins([x.shape[0]], [seed or 0])) for x, piece in pieces
        ]
        departed, sent_pairs = self.hops[0].begin(loads, count_ids(ranks, self.ep_size))
        self.clock.count_rows(sent_pairs, 0)  # work that experts get; what travels is counted in bytes
        return [_Travelling(one, seed is not None) for one in departed]

    def end_dispatch(self, departed: _Travelling) -> tuple[Tensor, DedupPlan]:
        """(R, D) rows of all peers for this rank's experts, sorted by local expert, and the plan. Hops after the first
        begin and end here."""
        first, *others = self.hops
        there, ways = first.end(departed.piece), [departed.piece.way]
        for hop in others:
            load = Load(there.rows_AD, there.local_AK, there.weights_AK, there.origins)
            (onward,), _ = hop.begin([load], there.local_AK.new_empty(0))
            there = hop.end(onward)
            ways.append(onward.way)
        self.clock.count_rows([0] * self.ep_size, there.num_pairs)
        to_experts = sort_by_expert(there.local_AK, self.num_local, there.num_pairs, self.kernels)
        sources = self._sources(there) if departed.draws_noise else None
        plan = DedupPlan(tuple(ways), to_experts, there.weights_AK, sources)
        return rows_from_tokens(there.rows_AD, to_experts), plan

    def begin_combine(self, rows_RD: Tensor, plan: DedupPlan) -> tuple[Tensor, RowExchange, DedupPlan]:
        """(R, D): weighted and summed over the experts of each rank where they are, then on the way back, up to the
        beginning of the last hop."""
        sums = tokens_from_rows(rows_RD, plan.weights_AK, plan.to_experts)
        first, *others = zip(self.hops, plan.ways, strict=True)
        for hop, way in reversed(others):
            sums = hop.end_back(*hop.begin_back(sums, way), way)
        hop, way = first
        return *hop.begin_back(sums, way), plan

    def end_combine(self, returning: tuple[Tensor, RowExchange, DedupPlan]) -> Tensor:
        """(T, D): summed over what comes home."""
        departed, exchange, plan = returning
        return self.hops[0].end_back(departed, exchange, plan.ways[0])

    def _sources(self, there: Arrived) -> Sources:
        """Whose the rows are: they lie by origin within every expert, as they have arrived."""
        parts = [count_ids(part.flatten(), self.num_local) for part in there.local_AK.split(there.origins.rows)]
        return Sources(torch.stack(parts), there.origins.seeds)


class HierarchicalDispatcher(DedupDispatcher):
    """`across`: one rank of each host, those with this one's local rank; `within`: the ranks of this host, all of
    `group`, which hold consecutive blocks of the experts."""

    def __init__(
        self,
        group: ProcessGroup,
        num_experts: int,
        layer: int,
        clock: Clock | None = None,
        *,
        across: ProcessGroup,
        within: ProcessGroup,
        casts: bool = False,
        kernels: str = "torch",
    ) -> None:
        super().__init__(group, num_experts, layer, clock, casts=casts, kernels=kernels)
        if across.size() * within.size() != self.ep_size:
            raise ValueError(f"{across.size()} hosts of {within.size()} ranks are not the {self.ep_size} of the group")
        self.across, self.within = across, within
        host, local_rank = across.rank(), within.rank()
        self.clock.name(across, [other * within.size() + local_rank for other in range(across.size())], self.ep_size)
        self.clock.name(within, [host * within.size() + other for other in range(within.size())], self.ep_size)

    @cached_property
    def hops(self) -> list[Hop]:
        """To the host, and inside it."""
        hosts = self.across.size()
        return [
            self._hop(self.across, self.num_experts),
            self._hop(self.within, self.num_experts // hosts),
        ]
