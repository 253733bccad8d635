"""Rows to the parts of a group of ranks: once to each part that holds any of a token's experts, and one sum back.

A part is a rank, or a host whose ranks share the rows out (`dispatch_dedup.py`, `dispatch_hierarchical.py`).

Shape suffixes: T tokens, K top-k, D hidden, P parts, O origins, U rows sent: (part, token) without repeats, A rows that
arrive.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_dist.models.permute import Permutation, count_ids, rows_from_tokens, sort_by_expert, sum_rows
from moe_dist.models.recompute import once
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.dispatch import AllToAll, as_it_travels, check_peers, exchange_headers


@dataclass(frozen=True)
class Origins:
    """The micro-batches whose rows lie here, one after the other: how many of each, and the seeds of their noise."""

    rows: list[int]
    seeds: list[int]


@dataclass(frozen=True)
class Way:
    """How rows travelled: token -> rows by part, and how many to and from each."""

    to_parts: Permutation
    send_splits: list[int]
    receive_splits: list[int]


@dataclass(frozen=True)
class Arrived:
    """What came: `rows_AD`; `local_AK` (int64) their experts, numbered within this part, or the number of these for
    none; `weights_AK` their routing weights, of other parts' experts without a gradient; `num_pairs` with an expert
    here."""

    rows_AD: Tensor
    local_AK: Tensor
    weights_AK: Tensor
    origins: Origins
    num_pairs: int


class Hop:
    """One exchange between the ranks of `group`, each of which stands for a part with an equal share of the experts."""

    _HEADER = 3  # layer, hidden size, pairs with an expert in the part; then rows and seed of each origin

    def __init__(self, group: ProcessGroup, num_experts: int, layer: int, clock: Clock, casts: bool) -> None:
        self.group, self.layer, self.clock, self.casts = group, layer, clock, casts
        self.num_parts = group.size()
        self.num_local = num_experts // self.num_parts

    def go(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, origins: Origins, also: Tensor
    ) -> tuple[Arrived, Way, list[int]]:
        """Rows to their parts. `also` (n,) int64: is brought to the host with what has to be brought there anyway."""
        part_TK = ids_TK.div(self.num_local, rounding_mode="floor")  # ids for no expert are of part P
        part_once_TK = _once_each(part_TK, self.num_parts)
        to_parts = sort_by_expert(part_once_TK, self.num_parts, None)
        pairs = count_ids(part_TK.flatten(), self.num_parts)
        send, receive, came, num_pairs, told = once(
            lambda: self._exchange_counts(
                self._rows_by_origin(part_once_TK, to_parts, origins), pairs, x_TD.shape[1], origins, also
            )
        )
        if sum(send) < to_parts.num_rows:
            to_parts = replace(to_parts, pair_of_row=to_parts.pair_of_row[: sum(send)], every_pair_has_a_row=False)
        way = Way(to_parts, send, receive)
        token_U = to_parts.token_of_row
        part_U = torch.repeat_interleave(to_parts.rows_per_expert, output_size=sum(send))
        ids_UK, part_UK = ids_TK.index_select(0, token_U), part_TK.index_select(0, token_U)
        local_UK = torch.where(part_UK == part_U[:, None], ids_UK % self.num_local, self.num_local)
        local_AK, weights_AK = self._send_choices(local_UK, weights_TK.index_select(0, token_U), way)
        rows_UD = as_it_travels(rows_from_tokens(x_TD, to_parts), self.casts)
        rows_AD = AllToAll.apply(rows_UD, receive, send, self.group, self.clock, self.layer, "dispatch")
        return Arrived(rows_AD, local_AK, weights_AK, came, num_pairs), way, told

    def back(self, sums_AD: Tensor, way: Way) -> Tensor:
        """(A, D) -> (T, D): home, and summed over parts."""
        rows_UD = AllToAll.apply(
            sums_AD, way.send_splits, way.receive_splits, self.group, self.clock, self.layer, "combine"
        )
        return sum_rows(rows_UD, way.to_parts)

    def _send_choices(self, local_UK: Tensor, weights_UK: Tensor, way: Way) -> tuple[Tensor, Tensor]:
        """Experts (int64) and weights of the rows that come, (A, K) each. Gradients of weights go back."""
        ways = (way.receive_splits, way.send_splits, self.group, self.clock, self.layer, "dispatch")
        # As whole numbers of the width of a weight they travel together; ids do not need more than 16 bits.
        wide = weights_UK.dtype.itemsize == 8
        bits = torch.int64 if wide else torch.int32
        packed = torch.cat((local_UK.to(bits), weights_UK.detach().contiguous().view(bits)), dim=1)
        local_AK, bits_AK = AllToAll.apply(packed, *ways).chunk(2, dim=1)
        weights_AK = bits_AK.contiguous().view(weights_UK.dtype)
        return local_AK.to(torch.int64), _Arrived.apply(weights_UK, weights_AK, ways)

    def _rows_by_origin(self, part_once_TK: Tensor, to_parts: Permutation, origins: Origins) -> Tensor:
        """(P, O) int64: rows of each origin that go to each part."""
        count = len(origins.rows)
        if count == 1:
            return to_parts.rows_per_expert[:, None]
        sizes = torch.tensor(origins.rows, device=part_once_TK.device)
        origin_T = torch.repeat_interleave(sizes, output_size=sum(origins.rows))
        both_TK = part_once_TK * count + origin_T[:, None]
        return count_ids(both_TK.flatten().clamp(max=self.num_parts * count), self.num_parts * count).view(-1, count)

    def _exchange_counts(
        self, rows_PO: Tensor, pairs_P: Tensor, hidden_size: int, origins: Origins, also: Tensor
    ) -> tuple[list[int], list[int], Origins, int, list[int]]:
        """Rows sent to and received from each part, whose they are, pairs that come in all; `also`."""
        parts, count = rows_PO.shape
        outgoing = rows_PO.new_empty(parts, self._HEADER + 2 * count)
        outgoing[:, 0], outgoing[:, 1], outgoing[:, 2] = self.layer, hidden_size, pairs_P
        outgoing[:, self._HEADER : self._HEADER + count] = rows_PO
        for origin, seed in enumerate(origins.seeds):  # one by one: a tensor of them would make a GPU wait
            outgoing[:, self._HEADER + count + origin] = seed
        incoming = exchange_headers(outgoing, self.group, self.clock, self.layer)
        numbers = torch.cat((incoming.flatten(), rows_PO.sum(1), also)).tolist()
        width = incoming.shape[1]
        headers = [numbers[at : at + width] for at in range(0, parts * width, width)]
        check_peers(headers, self.group, self.layer, hidden_size)
        rest = numbers[parts * width :]
        rows = [row[self._HEADER : self._HEADER + count] for row in headers]
        seeds = [seed for row in headers for seed in row[self._HEADER + count :]]
        came = Origins([number for row in rows for number in row], seeds)
        return rest[:parts], [sum(row) for row in rows], came, sum(row[2] for row in headers), rest[parts:]


def _once_each(part_TK: Tensor, none: int) -> Tensor:
    """Each token's parts without repeats, in ascending order; `none` in the places of repeats."""
    sorted_TK = part_TK.sort(dim=1).values
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
