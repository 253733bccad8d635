"""What the layers of one forward pass need from outside.

Shape suffixes: B batch, S sequence, T = B * S tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Load = tuple[Tensor, Tensor]
"""Pairs of each expert (1, E) and tokens (1,), both int64."""


@dataclass(frozen=True)
class RoutingContext:
    """The same object for every mixture-of-experts layer of a pass, and for what recomputation repeats of it."""

    valid_BS: Tensor | None = None
    """Bool, false at padding: such tokens go to no expert and count nowhere. None: no padding."""
    token_scale: float | Tensor = 1.0
    """1 / tokens of the global batch, the scale of auxiliary losses."""
    domain_ids_BS: Tensor | None = None
    """Int: named source of each token. It is only counted."""
    global_load: Mapping[int, Load] = field(default_factory=dict)
    """By layer number: the load of the whole global batch, where a first pass over all micro-batches has counted it."""
    reduce_load: Callable[[int, Tensor], Tensor] = lambda layer, counts: counts
    """A layer's counts (E + 1,), summed over the ranks that hold other tokens of the global batch (collective)."""

    @property
    def valid_T(self) -> Tensor | None:
        return None if self.valid_BS is None else self.valid_BS.flatten()


ALONE = RoutingContext()
"""Of a model by itself: one process, no padding."""
