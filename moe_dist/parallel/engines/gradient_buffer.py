"""Gradients side by side in one flat tensor, summed over replicas in buckets, while backward still computes others."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe_dist.models.precision import full_dtype
from moe_dist.parallel.engines.row_sum import RowSum, Started
from moe_dist.parallel.flight import GRADIENTS, Flight, Trace


class GradientBuffer:
    """Float32 gradients of some parameters, side by side in one flat tensor.

    A float32 parameter's `.grad` is a view into it, so it is zero and never None, whatever part of the model a
    batch used; that keeps optimizer state moving and collectives matched on every rank. Gradients of bfloat16
    parameters are added to their view as soon as they are complete, so accumulation keeps float32 precision.

    `group`: ranks that hold the same parameters, over which gradients are summed; None: there are no others. What
    backward completes first, the parameters that come last, lies first. Buckets are sent in that order on every rank,
    one that is ready early waits for those before it: ranks whose batches use different experts still call the same.
    `reduce_dtype`: of what travels and of the sums on the way; default: that of the buffer. `by_rows`: matrices of
    which a step fills few rows, and whether these travel alone even where they are many (`RowSum`).
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        device: torch.device,
        group: ProcessGroup | None = None,
        bucket_bytes: int = 4 * 2**20,
        reduce_dtype: torch.dtype | None = None,
        by_rows: Mapping[str, bool] | None = None,
    ) -> None:
        self.parameters, self.group = dict(named_parameters), group
        self.reduce_dtype = reduce_dtype or full_dtype()
        backwards = list(reversed(self.parameters.items()))
        sizes = [parameter.numel() for _, parameter in backwards]
        self.flat = torch.zeros(sum(sizes), dtype=full_dtype(), device=device)
        views = {name: view.view(p.shape) for (name, p), view in zip(backwards, self.flat.split(sizes), strict=True)}
        self.views = {name: views[name] for name in self.parameters}
        by_rows = {name: always for name, always in (by_rows or {}).items() if name in views}
        self.members = _in_buckets(backwards, bucket_bytes // self.flat.element_size(), by_rows)
        self.buckets = self.flat.split([sum(self.parameters[name].numel() for name in names) for names in self.members])
        self._row_sums: dict[int, RowSum] = {}
        if group is not None:
            for name, always in by_rows.items():
                self._row_sums[self.members.index([name])] = RowSum(views[name], group, self.reduce_dtype, always)
        self._missing: list[set[str]] = []
        self.trace: Trace | None = None
        self._flights: list[tuple[Flight, Callable[[], None]]] = []
        self._sent = 0
        for number, names in enumerate(self.members):
            for name in names:
                self._watch(name, number)

    def _watch(self, name: str, bucket: int) -> None:
        parameter, view = self.parameters[name], self.views[name]
        complete = parameter.dtype == view.dtype
        if complete:
            parameter.grad = view
        if not complete or self.group is not None:
            parameter.register_post_accumulate_grad_hook(self._on_gradient(name, bucket, None if complete else view))

    def _on_gradient(self, name: str, bucket: int, view: Tensor | None) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            if view is not None and parameter.grad is not None:
                _add_gradient(view, parameter)
            if self._missing:
                self._arrived(name, bucket)

        return take

    def _arrived(self, name: str, bucket: int) -> None:
        if name not in self._missing[bucket]:
            raise RuntimeError(
                f"{name}: backward gave it a second gradient after the first was counted as whole. "
                "parallel.overlap_grad_reduce=false sends gradients after backward"
            )
        self._missing[bucket].remove(name)
        while self._sent < len(self.buckets) and not self._missing[self._sent]:
            self._send_next()

    def _send_next(self) -> None:
        rows = self._row_sums.get(self._sent)
        works, finish = (rows.start() if rows is not None else None) or self._sum_whole(self.buckets[self._sent])
        self._flights.append((Flight(works, None, GRADIENTS, self.trace), finish))
        self._sent += 1

    def _sum_whole(self, bucket: Tensor) -> Started:
        summed = bucket.to(self.reduce_dtype)
        work = dist.all_reduce(summed, group=self.group, async_op=True)
        assert work is not None

        def finish() -> None:
            if summed.dtype != bucket.dtype:
                bucket.copy_(summed)

        return Started([work], finish)

    def zero(self) -> None:
        """Start the next optimizer step."""
        self.wait()
        self.flat.zero_()

    def reduce_early(self) -> None:
        """The backward pass that comes now is the step's last: a bucket travels as soon as it is complete."""
        if self.group is not None:
            self._missing = [set(names) for names in self.members]

    def send_rest(self) -> None:
        """What has not been sent: all of it without `reduce_early`, else parameters that got no gradient."""
        self._missing = []
        while self.group is not None and self._sent < len(self.buckets):
            self._send_next()

    def wait(self) -> None:
        """Until everything that was sent is summed over the group."""
        for flight, finish in self._flights:
            with nullcontext() if self.trace is None else self.trace.waiting(None, GRADIENTS):
                flight.land()
            finish()
        self._flights, self._missing, self._sent = [], [], 0

    def squared_norm(self) -> Tensor:
        """Sum of squares, 0-dim float64."""
        if not self.views:
            return torch.zeros((), dtype=torch.float64, device=self.flat.device)
        norms = torch._foreach_norm(list(self.views.values()))
        return torch.stack(norms).double().square().sum()


def _in_buckets(
    parameters: Iterable[tuple[str, nn.Parameter]], elements: int, alone: Container[str]
) -> list[list[str]]:
    """Names in their order, in groups of at least so many elements; the last may have fewer. Each of `alone` is one."""
    buckets: list[list[str]] = []
    filled = elements
    for name, parameter in parameters:
        if filled >= elements or name in alone:
            buckets.append([])
            filled = 0
        buckets[-1].append(name)
        filled = elements if name in alone else filled + parameter.numel()
    return buckets


def _add_gradient(view: Tensor, parameter: Tensor) -> None:
    """The gradient of a parameter of lower precision, to those before it."""
    assert parameter.grad is not None
    view.add_(parameter.grad)
    parameter.grad = None
