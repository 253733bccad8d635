"""Known bugs of parallel trainers, planted on purpose: proof that the proof can fail. `bugs.py` lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from moe_dist.verify.bugs import BUGS
from moe_dist.verify.injected_bugs import (
    adapters,
    engines,
    layers,
    layouts,
    lives,
    placement,
    preferences,
    routing,
    stages,
    updates,
)
from moe_dist.verify.injected_bugs.planting import REACHED as REACHED
from moe_dist.verify.injected_bugs.planting import Replace, replacing

Plant = Callable[[Replace], Any]
PLANTS: dict[str, Plant] = {
    name: plant
    for module in (layouts, stages, engines, layers, routing, placement, updates, adapters, preferences, lives)
    for name, plant in vars(module).items()
    if name in BUGS
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug `name` is in the system inside the block."""
    with ExitStack() as stack:
        PLANTS[name](replacing(stack, name))
        yield
