"""Dispatchers by name: the values of `parallel.dispatcher`, and what a class of a person's own must have.

Shape suffixes: T tokens, D hidden, R rows, e experts held here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_dist.models.moe import AtOnce, Dispatcher
from moe_dist.models.registry import Registry
from moe_dist.models.routing import Routing
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.dispatch import AllToAllDispatcher
from moe_dist.parallel.dispatch_dedup import DedupDispatcher, HierarchicalDispatcher
from moe_dist.parallel.dispatch_deepep import DeepEPDispatcher
from moe_dist.parallel.dispatch_specification import AllGatherDispatcher
from moe_dist.parallel.dispatch_static import StaticDispatcher
from moe_dist.parallel.mesh import Hosts

DISPATCHERS: Registry[Callable[..., Dispatcher]] = Registry("parallel.dispatcher", "dispatcher")
"""Called with (group, num_experts, layer, clock). With all experts on a rank there is `LocalDispatcher` instead."""
DISPATCHERS.register("all_to_all")(AllToAllDispatcher)
DISPATCHERS.register("dedup")(DedupDispatcher)
DISPATCHERS.register("hierarchical")(HierarchicalDispatcher)
DISPATCHERS.register("deepep")(DeepEPDispatcher)
DISPATCHERS.register("static")(StaticDispatcher)
DISPATCHERS.register("all_gather")(AllGatherDispatcher)


def build_dispatcher(
    name: str,
    group: ProcessGroup,
    num_experts: int,
    layer: int,
    clock: Clock | None = None,
    hosts: Hosts | None = None,
    *,
    casts: bool = False,
    kernels: str = "torch",
) -> Dispatcher:
    """Of one layer, whose experts are spread over `group`. `hosts`: of its ranks, for `hierarchical`; `casts`: experts
    begin by casting rows to autocast's dtype; `kernels`: by which the built-in ones move rows (`train.kernels`).

    Raises ValueError for a class that is no dispatcher.
    """
    kind: Any = DISPATCHERS.resolve(name)
    missing = [verb for verb in ("dispatch", "combine") if not callable(getattr(kind, verb, None))]
    if missing:
        raise ValueError(
            f"parallel.dispatcher={name}: it has no {' and no '.join(missing)}; a dispatcher has "
            "dispatch(x_TD, routing) -> (rows_RD, plan) and combine(rows_RD, plan) -> x_TD"
        )
    clock = clock or Clock(torch.device("cpu"))
    if kind is HierarchicalDispatcher:
        if hosts is None:
            raise ValueError("parallel.dispatcher=hierarchical: nobody has said which ranks share a host")
        spread = {"across": hosts.across, "within": hosts.within}
        return kind(group, num_experts, layer, clock, **spread, casts=casts, kernels=kernels)
    if kind in (AllToAllDispatcher, DedupDispatcher, DeepEPDispatcher, StaticDispatcher):
        return kind(group, num_experts, layer, clock, casts=casts, kernels=kernels)
    if kind is AllGatherDispatcher:
        return kind(group, num_experts, layer, clock)
    try:
        return _Checked(name, kind(group, num_experts, layer, clock), num_experts // group.size())
    except TypeError as error:
        raise ValueError(
            f"parallel.dispatcher={name}: it is called with (group, num_experts, layer, clock): {error}"
        ) from error


class _Checked(AtOnce):
    """A person's own dispatcher, whose answers are looked at before experts get them."""

    def __init__(self, name: str, own: Any, num_local: int) -> None:
        self.name, self.own, self.num_local = name, own, num_local

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Any]:
        answer = self.own.dispatch(x_TD, routing)
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Tensor)):
            raise ValueError(f"parallel.dispatcher={self.name}: dispatch must answer (rows_RD, plan)")
        rows_RD, plan = answer
        counts = getattr(plan, "rows_per_expert", None)
        if not isinstance(counts, Tensor) or counts.shape != (self.num_local,) or counts.dtype != torch.int64:
            raise ValueError(
                f"parallel.dispatcher={self.name}: its plan needs rows_per_expert, int64 ({self.num_local},): how many "
                "rows come for each expert held here"
            )
        if not hasattr(plan, "sources"):
            raise ValueError(
                f"parallel.dispatcher={self.name}: its plan needs sources: whose the rows are, a "
                "moe_dist.models.noise.Sources where the routing has a noise_seed, else None"
            )
        return rows_RD, plan

    def combine(self, rows_RD: Tensor, plan: Any) -> Tensor:
        return self.own.combine(rows_RD, plan)
