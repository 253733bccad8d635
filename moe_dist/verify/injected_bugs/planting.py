"""How a bug gets into the system for a while, and whether anything there has met it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, Protocol
from unittest.mock import patch

import torch.distributed as dist

from moe_dist.models.moe import LocalDispatcher, MoE
from moe_dist.parallel.engines.replicated import ReplicatedEngine

REACHED: Counter[str | None] = Counter()
"""By bug: how often this process has called what was put in the place of something."""


class Replace(Protocol):
    """Puts `wrong` in the place of the function `owner.name`."""

    def __call__(self, owner: Any, name: str, wrong: Callable[..., Any]) -> None: ...


def replacing(stack: ExitStack, bug: str) -> Replace:
    """For the plant of `bug`; what it replaces is as before when `stack` closes."""

    def replace(owner: Any, name: str, wrong: Callable[..., Any]) -> None:
        @wraps(wrong)
        def counted(*arguments: Any, **options: Any) -> Any:
            REACHED[bug] += 1
            return wrong(*arguments, **options)

        stack.enter_context(patch.object(owner, name, counted))

    return replace


def rank() -> int:
    """This process's number in the world; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def over_ranks(layer: MoE) -> bool:
    """Whether its experts are on several."""
    return not isinstance(layer.dispatcher, LocalDispatcher)


def after_reduce(replace: Replace, change: Callable[[ReplicatedEngine], object]) -> None:
    """Put `change` behind the sum of gradients over ranks."""
    reduce = ReplicatedEngine.reduce

    def wrong(self: ReplicatedEngine) -> None:
        reduce(self)
        change(self)

    replace(ReplicatedEngine, "reduce", wrong)
