"""Looking at routers while a model runs. Shape suffixes: T tokens, K top-k."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moe_dist.models.routing import Routing
from moe_dist.models.transformer import Transformer

Decisions = dict[int, tuple[Tensor, Tensor]]
"""By layer number: expert ids and weights (T, K) of the pass that was last."""


@contextmanager
def watching(model: Transformer) -> Iterator[Decisions]:
    """What the routers held here decide, of one pass after the other. An id of E is no expert."""
    seen: Decisions = {}

    def keeps(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(router: nn.Module, arguments: Any, decision: Any) -> None:
            routing = Routing.of(decision)
            seen[layer] = routing.expert_ids_TK.detach(), routing.weights_TK.detach()

        return keep

    hooks = [moe.router.register_forward_hook(keeps(moe.layer)) for moe in model.moe_layers()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
