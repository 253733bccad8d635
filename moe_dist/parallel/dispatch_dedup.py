"""Deduplicated dispatch: a token goes once to each rank that holds any of its experts, and one sum comes back.

With top-8 of 64 experts on two ranks a token has four pairs on the other rank, and one row instead of four travels each
way. Its expert ids and routing weights travel with it; the receiver hands it to its experts and sums what they answer.

Shape suffixes: T tokens, K top-k, D hidden, E experts, e = E / ep experts on this rank, U rows sent: (rank, token)
without repeats, A rows that arrive, R rows of experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_dist.models.noise import Sources
from moe_dist.models.permute import (
    Permutation,
    count_ids,
    rows_from_tokens,
    sort_by_expert,
    sum_rows,
    tokens_from_rows,
)
from moe_dist.models.recompute import once
from moe_dist.models.router import Routing
from moe_dist.parallel.dispatch import AllToAll, SpreadExperts, as_it_travels, check_peers, exchange_headers


@dataclass(frozen=True)
class DedupPlan:
    """How this rank's tokens travelled, and what became of those that came.

    `to_ranks`: token -> rows by rank; `to_experts`: row that came -> rows by local expert. `weights_AK`: routing
    weights of the rows that came; those of other ranks' experts have no gradient.
    """

    to_ranks: Permutation
    to_experts: Permutation
    weights_AK: Tensor
    send_splits: list[int]
    receive_splits: list[int]
    sources: Sources | None

    @property
    def rows_per_expert(self) -> Tensor:
        return self.to_experts.rows_per_expert


class DedupDispatcher(SpreadExperts):
    """Experts are spread in contiguous blocks over the ranks of `group`; the same verbs and gradients as
    `AllToAllDispatcher`, whose sums over k it makes in two parts: over the experts of a rank there, over ranks here.
    """

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, DedupPlan]:
        """(T, D) -> (R, D) rows of all peers for this rank's experts, sorted by local expert, and the plan."""
        ids_TK, seed = routing.expert_ids_TK, routing.noise_seed
        rank_TK = ids_TK.div(self.num_local, rounding_mode="floor")  # ids of E, for no expert, are of rank ep
        to_ranks = sort_by_expert(_once_each(rank_TK, self.ep_size), self.ep_size, None)
        pairs_per_rank = count_ids(rank_TK.flatten(), self.ep_size)
        send, receive, sent_pairs, num_rows, seeds = once(
            lambda: self._exchange_counts(to_ranks.rows_per_expert, pairs_per_rank, x_TD.shape[1], seed or 0)
        )
        if sum(send) < to_ranks.num_rows:
            to_ranks = replace(to_ranks, pair_of_row=to_ranks.pair_of_row[: sum(send)], every_pair_has_a_row=False)
        self.clock.count_rows(sent_pairs, num_rows)  # of the work that experts get; what travels is counted in bytes
        token_U = to_ranks.token_of_row
        rank_U = torch.repeat_interleave(to_ranks.rows_per_expert, output_size=sum(send))
        ids_UK, rank_UK = ids_TK.index_select(0, token_U), rank_TK.index_select(0, token_U)
        local_UK = torch.where(rank_UK == rank_U[:, None], ids_UK % self.num_local, self.num_local)
        weights_UK = routing.weights_TK.index_select(0, token_U)
        local_AK, weights_AK = self._send_choices(local_UK, weights_UK, send, receive)
        ways = (receive, send, self.group, self.clock, self.layer)
        rows_UD = as_it_travels(rows_from_tokens(x_TD, to_ranks), self.casts)
        arrived_AD = AllToAll.apply(rows_UD, *ways, "dispatch")
        to_experts = sort_by_expert(local_AK, self.num_local, num_rows)
        sources = None if seed is None else self._sources(local_AK, receive, seeds)
        plan = DedupPlan(to_ranks, to_experts, weights_AK, send, receive, sources)
        return rows_from_tokens(arrived_AD, to_experts), plan

    def combine(self, rows_RD: Tensor, plan: DedupPlan) -> Tensor:
        """(R, D) -> (T, D): weighted and summed over the experts of each rank where they are, then over ranks here."""
        sums_AD = tokens_from_rows(rows_RD, plan.weights_AK, plan.to_experts)
        ways = (plan.send_splits, plan.receive_splits, self.group, self.clock, self.layer)
        return sum_rows(AllToAll.apply(sums_AD, *ways, "combine"), plan.to_ranks)

    def _send_choices(
        self, local_UK: Tensor, weights_UK: Tensor, send: list[int], receive: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Local expert ids (int64) and weights of the rows that come, (A, K) each. Gradients of weights go back."""
        ways = (receive, send, self.group, self.clock, self.layer, "dispatch")
        # As whole numbers of the width of a weight they travel together; ids do not need more than 16 bits.
        wide = weights_UK.dtype.itemsize == 8
        bits = torch.int64 if wide else torch.int32
        packed = torch.cat((local_UK.to(bits), weights_UK.detach().contiguous().view(bits)), dim=1)
        came = AllToAll.apply(packed, *ways)
        local_AK, bits_AK = came.chunk(2, dim=1)
        weights_AK = bits_AK.contiguous().view(weights_UK.dtype)
        return local_AK.to(torch.int64), _Arrived.apply(weights_UK, weights_AK, ways)

    def _sources(self, local_AK: Tensor, receive: list[int], seeds: list[int]) -> Sources:
        """Whose the rows are: they lie by source within every expert, as rows arrive by source."""
        parts = [count_ids(part.flatten(), self.num_local) for part in local_AK.split(receive)]
        return Sources(torch.stack(parts), seeds)

    def _exchange_counts(
        self, rows_per_rank: Tensor, pairs_per_rank: Tensor, hidden_size: int, seed: int
    ) -> tuple[list[int], list[int], list[int], int, list[int]]:
        """Rows sent to and received from each peer, pairs sent to each, pairs that come in all, the seeds of peers."""
        outgoing = torch.empty(self.ep_size, 5, dtype=torch.int64, device=rows_per_rank.device)
        outgoing[:, 0], outgoing[:, 1], outgoing[:, 2] = self.layer, hidden_size, seed
        outgoing[:, 3], outgoing[:, 4] = rows_per_rank, pairs_per_rank
        incoming = exchange_headers(outgoing, self.group, self.clock, self.layer)
        both = torch.cat((incoming, outgoing[:, 3:]), dim=1).tolist()
        check_peers(both, self.group, self.layer, hidden_size)
        _, _, seeds, receive, pairs, send, sent_pairs = map(list, zip(*both, strict=True))
        return send, receive, sent_pairs, sum(pairs), seeds


def _once_each(rank_TK: Tensor, none: int) -> Tensor:
    """Each token's ranks without repeats, in ascending order; `none` in the places of repeats."""
    sorted_TK = rank_TK.sort(dim=1).values
    repeats = sorted_TK[:, 1:] == sorted_TK[:, :-1]
    return torch.cat((sorted_TK[:, :1], sorted_TK[:, 1:].masked_fill(repeats, none)), dim=1)


class _Arrived(torch.autograd.Function):
    """Weights that have arrived with something else; backward sends their gradients the way back."""

    @staticmethod
    def forward(ctx: Any, weights_UK: Tensor, weights_AK: Tensor, ways: tuple[Any, ...]) -> Tensor:
        receive, send, *rest = ways
        ctx.back = (send, receive, *rest)
        return weights_AK.view_as(weights_AK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return AllToAll.apply(grads[0], *ctx.back), None, None
