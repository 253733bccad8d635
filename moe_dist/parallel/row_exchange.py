"""Rows to peers and their gradients back while this rank computes something else: the only file that calls all-to-all.

An exchange has two ends, in forward and in backward: rows depart in one autograd function and arrive in another, and
gradients depart in the backward of the second and arrive in that of the first. Autograd runs backward in the opposite
order of forward, so what is computed between the ends in forward hides the exchange in both. Exchanges of one pair of
ranks keep their order: all ranks start the same ones in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_dist.parallel.comm_timer import Clock, Way
from moe_dist.parallel.flight import Flight


@dataclass(frozen=True)
class Route:
    """How many rows come from and go to each rank of `group`, for which layer, and which way."""

    receive_splits: list[int]
    send_splits: list[int]
    group: ProcessGroup
    clock: Clock
    layer: int
    way: Way

    @property
    def back(self) -> Route:
        return Route(self.send_splits, self.receive_splits, self.group, self.clock, self.layer, self.way)

    def send(self, rows: Tensor) -> tuple[Tensor, Flight]:
        """Rows set out; where they will lie, and what is to be waited for first."""
        received = rows.new_empty(sum(self.receive_splits), rows.shape[1])
        self.clock.count(self.send_splits, rows.shape[1] * rows.element_size(), self.group)
        with self.clock.measure(self.layer, self.way):
            works = start_rows(received, rows.contiguous(), self.receive_splits, self.send_splits, self.group)
        return received, Flight(works, self.layer, self.way, self.clock.trace)


class RowExchange:
    """One exchange by a route, with both of its ends: `arrive(depart(rows))` is what peers have sent."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self._coming: tuple[Tensor, Flight] | None = None

    def depart(self, rows: Tensor) -> Tensor:
        """Rows set out. The answer is for `arrive` alone: its memory is still being written."""
        return Depart.apply(rows, self, True)

    def depart_within(self, values: Tensor) -> Tensor:
        """As `depart`, of what has been sent in another exchange: only gradients travel, on their way back."""
        return Depart.apply(values, self, False)

    def arrive(self, departed: Tensor, values: Tensor | None = None) -> Tensor:
        """Waits for the rows. `values`: what has come in another exchange instead (`depart_within`)."""
        return Arrive.apply(departed, self, values)

    def start(self, rows: Tensor, route: Route) -> Tensor:
        """Rows set out; where others will lie, once they have come."""
        self._coming = route.send(rows)
        return self._coming[0]

    def wait(self) -> Tensor:
        """Rows that have come."""
        assert self._coming is not None
        received, flight = self._coming
        with self.route.clock.measure(self.route.layer, self.route.way):
            flight.land()
        self._coming = None
        return received


class Depart(torch.autograd.Function):
    """The end at which rows set out, and their gradients come home."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: RowExchange, travels: bool) -> Tensor:
        ctx.exchange = exchange
        if travels:
            return exchange.start(rows, exchange.route)
        return rows.new_empty(sum(exchange.route.receive_splits), rows.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.wait(), None, None


class Arrive(torch.autograd.Function):
    """The end at which rows arrive, and their gradients set out."""

    @staticmethod
    def forward(ctx: Any, departed: Tensor, exchange: RowExchange, values: Tensor | None) -> Tensor:
        ctx.exchange = exchange
        if values is not None:
            return values.view_as(values)
        return exchange.wait().view_as(departed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.exchange.start(grads[0], ctx.exchange.route.back)
        return grads[0], None, None  # for the shape: `Depart` has what comes


def start_rows(
    received: Tensor, rows: Tensor, receive_splits: list[int], send_splits: list[int], group: ProcessGroup
) -> list[dist.Work]:
    """Uneven all-to-all of contiguous rows, to be waited for.

    On gloo as messages to and from each peer, all under way at once: its own uneven all-to-all sends to one peer at a
    time and does not receive meanwhile, so that a link carries one direction after the other.
    """
    if dist.get_backend(group) != "gloo" or rows.device.type != "cpu":  # its messages know no other memory
        work = dist.all_to_all_single(received, rows, receive_splits, send_splits, group=group, async_op=True)
        assert work is not None
        return [work]
    me, works = group.rank(), []
    incoming, outgoing = received.split(receive_splits), rows.split(send_splits)
    for step in range(1, group.size()):
        source, target = (me - step) % group.size(), (me + step) % group.size()
        # Empty ones too: by the number of its calls a rank is known that keeps the others waiting.
        works.append(dist.irecv(incoming[source], group=group, group_src=source))
        works.append(dist.isend(outgoing[target], group=group, group_dst=target))
    incoming[me].copy_(outgoing[me])
    assert None not in works
    return works  # type: ignore[return-value]


def exchange_headers(outgoing: Tensor, group: ProcessGroup, clock: Clock, layer: int) -> Tensor:
    """Row p of `outgoing` (ep, n) goes to peer p; row p of the answer has come from it."""
    incoming = torch.empty_like(outgoing)
    clock.count([1] * group.size(), outgoing[0].nbytes, group)
    with clock.measure(layer):
        dist.all_to_all_single(incoming, outgoing, group=group)
    return incoming
