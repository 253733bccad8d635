"""Rows to the parts of a group of ranks: once to each part that holds any of a token's experts, and one sum back.

A part is a rank, or a host whose ranks share the rows out (`dispatch_dedup.py`, `dispatch_hierarchical.py`).

Shape suffixes: T tokens, K top-k, D hidden, P parts, O origins, U rows sent: (part, token) without repeats, A rows that
arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_dist.models.permute import Permutation, count_ids, rows_from_tokens, sort_by_expert, sum_rows
from moe_dist.models.recompute import once
from moe_dist.parallel import comm_timer
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.dispatch import as_it_travels, check_peers
from moe_dist.parallel.row_exchange import Route, RowExchange, exchange_headers


@dataclass(frozen=True)
class Origins:
    """The micro-batches whose rows lie here, one after the other: how many of each, and the seeds of their noise."""

    rows: list[int]
    seeds: list[int]


@dataclass(frozen=True)
class Load:
    """What sets out: tokens, ids of their experts among those of all parts, or their number for none; weights."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    origins: Origins


@dataclass(frozen=True)
class Counted:
    """Of a piece: rows of each origin, and pairs with an expert, for each part."""

    rows_PO: Tensor
    pairs_P: Tensor
    origins: Origins


@dataclass(frozen=True)
class Coming:
    """Of a piece: rows sent to and received from each part, whose those are, and their pairs with an expert here."""

    send_splits: list[int]
    receive_splits: list[int]
    origins: Origins
    num_pairs: int


@dataclass(frozen=True)
class Way:
    """How rows travelled: token -> rows by part, and how many to and from each."""

    to_parts: Permutation
    send_splits: list[int]
    receive_splits: list[int]

    @property
    def back(self) -> Way:
        return Way(self.to_parts, self.receive_splits, self.send_splits)


@dataclass(frozen=True)
class Departed:
    """A piece on its way: what has been sent, each with its exchange."""

    coming: Coming
    way: Way
    choices: tuple[Tensor, RowExchange]
    """Experts and weights of rows, as whole numbers."""
    weights: tuple[Tensor, RowExchange]
    """They come with the choices; their gradients travel back alone."""
    rows: tuple[Tensor, RowExchange]


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

    _HEADER = 2  # layer, hidden size; then of each piece pairs with an expert in the part, rows and seed of origins

    def __init__(
        self, group: ProcessGroup, num_experts: int, layer: int, clock: Clock, casts: bool, kernels: str
    ) -> None:
        self.group, self.layer, self.clock, self.casts, self.kernels = group, layer, clock, casts, kernels
        self.num_parts = group.size()
        self.num_local = num_experts // self.num_parts

    def begin(self, pieces: Sequence[Load], also: Tensor) -> tuple[list[Departed], list[int]]:
        """Rows of every piece set out for their parts. `also` (n,) int64: is brought to the host with what has to be
        brought there anyway."""
        sorted_pieces, counted = [], []
        for piece in pieces:
            part_TK = piece.ids_TK.div(self.num_local, rounding_mode="floor")  # ids for no expert are of part P
            part_once_TK = _once_each(part_TK, self.num_parts)
            to_parts = sort_by_expert(part_once_TK, self.num_parts, None, self.kernels)
            sorted_pieces.append((part_TK, to_parts))
            rows_PO = self._rows_by_origin(part_once_TK, to_parts, piece.origins)
            counted.append(Counted(rows_PO, count_ids(part_TK.flatten(), self.num_parts), piece.origins))
        hidden = pieces[0].x_TD.shape[1]
        coming, extra = once(lambda: self._exchange_counts(counted, hidden, also))
        each = zip(pieces, sorted_pieces, coming, strict=True)
        return [self._depart(piece, *found, came) for piece, found, came in each], extra

    def _depart(self, piece: Load, part_TK: Tensor, to_parts: Permutation, coming: Coming) -> Departed:
        sent = sum(coming.send_splits)
        if sent < to_parts.num_rows:
            to_parts = replace(to_parts, pair_of_row=to_parts.pair_of_row[:sent], every_pair_has_a_row=False)
        way = Way(to_parts, coming.send_splits, coming.receive_splits)
        token_U = to_parts.token_of_row
        part_U = torch.repeat_interleave(to_parts.rows_per_expert, output_size=sent)
        ids_UK, part_UK = piece.ids_TK.index_select(0, token_U), part_TK.index_select(0, token_U)
        local_UK = torch.where(part_UK == part_U[:, None], ids_UK % self.num_local, self.num_local)
        weights_UK = piece.weights_TK.index_select(0, token_U)
        choices, weights, rows = (self._exchange(way, "dispatch") for _ in range(3))
        # As whole numbers of the width of a weight they travel together; ids do not need more than 16 bits.
        bits = torch.int64 if weights_UK.dtype.itemsize == 8 else torch.int32
        packed = torch.cat((local_UK.to(bits), weights_UK.detach().contiguous().view(bits)), dim=1)
        return Departed(
            coming,
            way,
            choices=(choices.depart(packed), choices),
            weights=(weights.depart_within(weights_UK), weights),
            rows=(rows.depart(as_it_travels(rows_from_tokens(piece.x_TD, to_parts), self.casts)), rows),
        )

    def end(self, departed: Departed) -> Arrived:
        """What has come."""
        packed, choices = departed.choices
        local_AK, bits_AK = choices.arrive(packed).chunk(2, dim=1)
        empty, weights = departed.weights
        weights_AK = weights.arrive(empty, bits_AK.contiguous().view(empty.dtype))
        rows, exchange = departed.rows
        rows_AD = exchange.arrive(rows)
        return Arrived(
            rows_AD, local_AK.to(torch.int64), weights_AK, departed.coming.origins, departed.coming.num_pairs
        )

    def begin_back(self, sums_AD: Tensor, way: Way) -> tuple[Tensor, RowExchange]:
        """(A, D): rows set out for home."""
        exchange = self._exchange(way.back, "combine")
        return exchange.depart(sums_AD), exchange

    def end_back(self, departed: Tensor, exchange: RowExchange, way: Way) -> Tensor:
        """(T, D): they are there, and summed over parts."""
        return sum_rows(exchange.arrive(departed), way.to_parts)

    def _exchange(self, way: Way, direction: comm_timer.Way) -> RowExchange:
        route = Route(way.receive_splits, way.send_splits, self.group, self.clock, self.layer, direction)
        return RowExchange(route)

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
        self, pieces: Sequence[Counted], hidden_size: int, also: Tensor
    ) -> tuple[list[Coming], list[int]]:
        """What comes of each piece; `also`."""
        parts = self.num_parts
        counts = [len(piece.origins.rows) for piece in pieces]
        first = pieces[0].pairs_P.new_empty(parts, self._HEADER)
        first[:, 0], first[:, 1] = self.layer, hidden_size
        columns = [first]
        for piece, count in zip(pieces, counts, strict=True):
            seeds = first.new_empty(parts, count)
            for origin, seed in enumerate(piece.origins.seeds):  # one by one: a tensor would make a GPU wait
                seeds[:, origin] = seed
            columns += [piece.pairs_P[:, None], piece.rows_PO, seeds]
        incoming = exchange_headers(torch.cat(columns, dim=1), self.group, self.clock, self.layer)
        sent = [piece.rows_PO.sum(1) for piece in pieces]
        numbers = torch.cat((incoming.flatten(), *sent, also)).tolist()
        width = incoming.shape[1]
        headers = [numbers[at : at + width] for at in range(0, parts * width, width)]
        check_peers(headers, self.group, self.layer, hidden_size)
        rest, at, coming = numbers[parts * width :], self._HEADER, []
        for count in counts:
            rows = [row[at + 1 : at + 1 + count] for row in headers]
            seeds_of = [seed for row in headers for seed in row[at + 1 + count : at + 1 + 2 * count]]
            origins = Origins([number for row in rows for number in row], seeds_of)
            coming.append(Coming(rest[:parts], [sum(row) for row in rows], origins, sum(row[at] for row in headers)))
            rest, at = rest[parts:], at + 1 + 2 * count
        return coming, rest


def _once_each(part_TK: Tensor, none: int) -> Tensor:
    """Each token's parts without repeats, in ascending order; `none` in the places of repeats."""
    sorted_TK = part_TK.sort(dim=1).values
    repeats = sorted_TK[:, 1:] == sorted_TK[:, :-1]
    return torch.cat((sorted_TK[:, :1], sorted_TK[:, 1:].masked_fill(repeats, none)), dim=1)
