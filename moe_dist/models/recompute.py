"""Activation checkpointing that repeats arithmetic, never decisions.

Repeated arithmetic may order near-equal scores differently, and rows sent to other experts than before would not fit
the saved shapes. So whatever chooses (top-k, argmax, sampling, sorting) runs once, in the first forward pass, and its
results are handed out again when the pass is repeated. Nothing is counted twice either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

_DECISIONS = {
    torch.ops.aten.topk.default,
    torch.ops.aten.argmax.default,
    torch.ops.aten.multinomial.default,
    torch.ops.aten.sort.default,
    torch.ops.aten.sort.stable,
}
_recomputing = False


def is_recomputing() -> bool:
    """Whether a forward pass is being repeated."""
    return _recomputing


@contextmanager
def recomputing() -> Iterator[None]:
    """Inside: a repeated forward pass."""
    global _recomputing
    before, _recomputing = _recomputing, True
    try:
        yield
    finally:
        _recomputing = before


def recompute(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, its activations dropped and computed again in backward, its decisions kept."""
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[Any, Any]:
    results: list[Any] = []
    return _Keep(results), _Again(results)


class _Again:
    """The context of a repeated pass. A split backward (`parallel/pipeline.py`) repeats it several times."""

    def __init__(self, results: list[Any]) -> None:
        self.results = results
        self.contexts: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(_HandOut(self.results))
            stack.enter_context(recomputing())
            self.contexts.append(stack.pop_all())

    def __exit__(self, *error: Any) -> bool | None:
        return self.contexts.pop().__exit__(*error)


class _Keep(TorchDispatchMode):
    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _DECISIONS:
            self.results.append(result)
        return result


class _HandOut(TorchDispatchMode):
    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self.remaining = iter(results)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _DECISIONS:
            return next(self.remaining)
        return func(*args, **(kwargs or {}))
