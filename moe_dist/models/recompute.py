"""Activation checkpointing that repeats arithmetic, never decisions, and repeats it once.

Repeated arithmetic may order near-equal scores differently, and rows sent to other experts than before would not fit
the saved shapes. So whatever chooses (top-k, argmax, sampling, sorting) runs once, in the first forward pass, and its
results are handed out again when the pass is repeated. Nothing is counted twice, and what ranks have agreed on is
not asked again (`once`).

PyTorch's own checkpointing repeats a pass for every run of the autograd engine that asks for its tensors. A schedule
that splits backward (`parallel/pipeline.py`) is one run for the inputs and one for each group of weights; how many
groups there are depends on which experts got rows, so that ranks would repeat an all-to-all different numbers of times.
Here the tensors of the one repetition stay until the graph lets go of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import get_device_states, set_device_states

T = TypeVar("T")

_DECISIONS = {
    torch.ops.aten.topk.default,
    torch.ops.aten.argmax.default,
    torch.ops.aten.argmin.default,
    torch.ops.aten.max.dim,
    torch.ops.aten.min.dim,
    torch.ops.aten.multinomial.default,
    torch.ops.aten.sort.default,
    torch.ops.aten.sort.stable,
}
_recomputing = False
_running: list[_Pass] = []


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
    """`function(*arguments)`, its activations dropped and computed again in backward, its decisions kept.

    Raises RuntimeError in backward when the repeated pass keeps other tensors than the first.
    """
    return _Pass(function, arguments).first()


def once(compute: Callable[[], T]) -> T:
    """`compute()`, or in a repeated pass what it gave in the first: for reductions and exchanges between ranks."""
    return _running[-1].once(compute) if _running else compute()


class _Kept:
    """A tensor that backward will ask for: there from the repetition on."""

    __slots__ = ("__weakref__", "kind", "origin", "tensor")

    def __init__(self, origin: _Pass, tensor: Tensor) -> None:
        self.origin, self.kind = origin, _kind(tensor)
        self.tensor: Tensor | None = None


class _AllKept(Exception):
    """The repeated pass has computed the last tensor that is wanted."""


class _Pass:
    """One forward pass: what its repetition needs, and what that must not do again."""

    def __init__(self, function: Callable[..., Tensor], arguments: tuple) -> None:
        self.function, self.arguments = function, arguments
        self.kept: list[weakref.ref[_Kept]] = []
        self.results: list[Any] = []
        self.remaining: Iterator[Any] | None = None
        self.device_type = next((x.device.type for x in arguments if isinstance(x, Tensor)), "cpu")
        self.autocast = partial(
            torch.autocast,
            self.device_type,
            torch.get_autocast_dtype(self.device_type),
            torch.is_autocast_enabled(self.device_type),
            torch.is_autocast_cache_enabled(),
        )
        self.random_state, self.device_states = torch.get_rng_state(), get_device_states(*arguments)

    def first(self) -> Tensor:
        with self._decided_once(), saved_tensors_hooks(self._keep, _unpack):
            return self.function(*self.arguments)

    def repeat(self) -> None:
        """Fill what was kept. The random state is that of the first pass, and afterwards as it was before."""
        self.remaining, waiting = iter(self.results), iter(self.kept)
        left = len(self.kept)

        def fill(tensor: Tensor) -> None:
            nonlocal left
            kept, left = next(waiting)(), left - 1
            if kept is not None:
                if kept.kind != _kind(tensor):
                    raise RuntimeError(f"{_NOT_REPEATABLE}: a tensor {_kind(tensor)} where it was {kept.kind}")
                kept.tensor = tensor.detach()
            if not left:
                raise _AllKept

        with ExitStack() as stack:
            stack.enter_context(self._as_at_first())
            stack.enter_context(self._decided_once())
            stack.enter_context(recomputing())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(fill, _unpack))
            try:
                self.function(*map(_detached, self.arguments))
            except _AllKept:
                self.arguments, self.results = (), []  # nothing is left to repeat
                return
        raise RuntimeError(f"{_NOT_REPEATABLE}: {left} of {len(self.kept)} tensors are missing")

    def once(self, compute: Callable[[], T]) -> T:
        if self.remaining is not None:
            for result in self.remaining:
                return result
            raise RuntimeError(f"{_NOT_REPEATABLE}: it decides more than {len(self.results)} times")
        count = len(self.results)
        value = compute()
        self.results[count:] = [value]  # decisions within it are not asked for
        return value

    def _keep(self, tensor: Tensor) -> _Kept:
        kept = _Kept(self, tensor)
        self.kept.append(weakref.ref(kept))
        return kept

    @contextmanager
    def _decided_once(self) -> Iterator[None]:
        _running.append(self)
        try:
            with _DecideOnce():
                yield
        finally:
            _running.pop()

    @contextmanager
    def _as_at_first(self) -> Iterator[None]:
        """Autocast and random state of the first pass."""
        devices, states = self.device_states
        kind = self.device_type if devices else "cuda"
        with torch.random.fork_rng(devices, device_type=kind), self.autocast():
            torch.set_rng_state(self.random_state)
            set_device_states(devices, states, device_type=kind)
            yield


_NOT_REPEATABLE = "recomputation of a block in backward differs from its forward pass"


def _unpack(kept: _Kept) -> Tensor:
    if kept.tensor is None:
        kept.origin.repeat()
    assert kept.tensor is not None
    return kept.tensor


def _kind(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape)


def _detached(argument: Any) -> Any:
    """Its own leaf, so that the repeated pass has no graph behind it."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().requires_grad_(argument.requires_grad)


class _DecideOnce(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _DECISIONS:
            return once(lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))
