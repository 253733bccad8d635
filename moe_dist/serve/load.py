"""How much of served traffic each expert gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_dist.models.routing import Routing

if TYPE_CHECKING:
    from moe_dist.generate.engine import MoEInferenceEngine
    from moe_dist.models.moe import Dispatcher


class ServedLoad:
    """Tokens that each expert has got, counted where they are dispatched: padding counts nowhere."""

    def __init__(self, engine: MoEInferenceEngine) -> None:
        self._mesh = engine.mesh
        self._counts: dict[int, Tensor] = {}
        for moe in engine.model.moe_layers():
            device = next(moe.router.parameters()).device
            self._counts[moe.layer] = torch.zeros(moe.num_experts + 1, dtype=torch.int64, device=device)
            moe.reach_experts_by(_Counting(moe.dispatcher, self._counts[moe.layer]))

    def of_all_ranks(self) -> dict[int, list[int]]:
        """By layer, for each expert. A collective."""
        held = [(layer, counts[:-1].tolist()) for layer, counts in self._counts.items()]
        total: dict[int, list[int]] = {}
        for rank in self._mesh.from_all(held):
            for layer, counts in rank:
                before = total.get(layer, [0] * len(counts))
                total[layer] = [one + other for one, other in zip(before, counts, strict=True)]
        return dict(sorted(total.items()))


class _Counting:
    """A dispatcher that counts what it is given."""

    def __init__(self, dispatcher: Dispatcher, counts: Tensor) -> None:
        self._dispatcher, self._counts = dispatcher, counts

    def begin_dispatch(self, x_TD: Tensor, routing: Routing, num_pieces: int = 1) -> list[Any]:
        ids = routing.expert_ids_TK.flatten()
        self._counts.index_add_(0, ids, self._counts.new_ones(()).expand(ids.shape))
        return self._dispatcher.begin_dispatch(x_TD, routing, num_pieces)

    def end_dispatch(self, departed: Any) -> tuple[Tensor, Any]:
        return self._dispatcher.end_dispatch(departed)

    def begin_combine(self, rows_RD: Tensor, plan: Any) -> Any:
        return self._dispatcher.begin_combine(rows_RD, plan)

    def end_combine(self, returning: Any) -> Tensor:
        return self._dispatcher.end_combine(returning)
