"""Deduplicated dispatch: a token goes once to each rank that holds any of its experts, and one sum comes back.

With top-8 of 64 experts on two ranks a token has four pairs on the other rank, and one row instead of four travels each
way. Its expert ids and routing weights travel with it; the receiver hands it to its experts and sums what they answer.

Hierarchical: once to each host, to the rank there with the same place as its own, and from there once to each rank. A
token with experts on three ranks of another host crosses the network once. Each way it is summed where ways part.

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
from moe_dist.models.router import Routing
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.dispatch import SpreadExperts
from moe_dist.parallel.dispatch_hop import Arrived, Hop, Origins, Way


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


class DedupDispatcher(SpreadExperts):
    """Experts are spread in contiguous blocks over the ranks of `group`; the same verbs and gradients as
    `AllToAllDispatcher`, whose sums over k it makes in parts: over the experts of a rank there, over ranks here.
    """

    @cached_property
    def hops(self) -> list[Hop]:
        """The way to the rank of an expert."""
        return [Hop(self.group, self.num_experts, self.layer, self.clock, self.casts)]

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, DedupPlan]:
        """(T, D) -> (R, D) rows of all peers for this rank's experts, sorted by local expert, and the plan."""
        ids_TK, seed = routing.expert_ids_TK, routing.noise_seed
        ranks = ids_TK.flatten().div(self.num_local, rounding_mode="floor")  # ids of E, for no expert, are of rank ep
        also = count_ids(ranks, self.ep_size)
        there = Arrived(x_TD, ids_TK, routing.weights_TK, Origins([x_TD.shape[0]], [seed or 0]), 0)
        ways: list[Way] = []
        sent_pairs: list[int] = []
        for hop in self.hops:
            there, way, told = hop.go(there.rows_AD, there.local_AK, there.weights_AK, there.origins, also)
            ways.append(way)
            sent_pairs, also = [*sent_pairs, *told], also[:0]
        self.clock.count_rows(sent_pairs, there.num_pairs)  # work that experts get; what travels is counted in bytes
        to_experts = sort_by_expert(there.local_AK, self.num_local, there.num_pairs)
        sources = None if seed is None else self._sources(there)
        plan = DedupPlan(tuple(ways), to_experts, there.weights_AK, sources)
        return rows_from_tokens(there.rows_AD, to_experts), plan

    def combine(self, rows_RD: Tensor, plan: DedupPlan) -> Tensor:
        """(R, D) -> (T, D): weighted and summed over the experts of each rank where they are, then on the way back."""
        sums = tokens_from_rows(rows_RD, plan.weights_AK, plan.to_experts)
        for hop, way in reversed(list(zip(self.hops, plan.ways, strict=True))):
            sums = hop.back(sums, way)
        return sums

    def _sources(self, there: Arrived) -> Sources:
        """Whose the rows are: they lie by origin within every expert, as they have arrived."""
        parts = [count_ids(part.flatten(), self.num_local) for part in there.local_AK.split(there.origins.rows)]
        return Sources(torch.stack(parts), there.origins.seeds)


class HierarchicalDispatcher(DedupDispatcher):
    """`across`: one rank of each host, those with this one's place there; `within`: the ranks of this host, all of
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
    ) -> None:
        super().__init__(group, num_experts, layer, clock, casts=casts)
        if across.size() * within.size() != self.ep_size:
            raise ValueError(f"{across.size()} hosts of {within.size()} ranks are not the {self.ep_size} of the group")
        self.across, self.within = across, within
        host, place = across.rank(), within.rank()
        self.clock.name(across, [other * within.size() + place for other in range(across.size())], self.ep_size)
        self.clock.name(within, [host * within.size() + other for other in range(within.size())], self.ep_size)

    @cached_property
    def hops(self) -> list[Hop]:
        """To the host, and inside it."""
        hosts = self.across.size()
        return [
            Hop(self.across, self.num_experts, self.layer, self.clock, self.casts),
            Hop(self.within, self.num_experts // hosts, self.layer, self.clock, self.casts),
        ]
