"""Names for parts of the model while it is profiled, and which time belongs to which part.

Forward, a part is a `record_function` range around a module, a verb of the dispatcher or an all-to-all. Backward has
no modules: an autograd node belongs to the range in which it was made, which its sequence number tells. Nothing of
this is there unless a profiler runs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from moe_dist.models.attention import Attention
from moe_dist.models.block import Block
from moe_dist.models.experts import ExpertList, Experts
from moe_dist.models.layers import SwiGLU
from moe_dist.models.moe import Dispatcher, MoE
from moe_dist.models.router import Router
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.comm_timer import Clock, Way

PREFIX = "moe_dist/"
BACKWARD = "autograd::engine::evaluate_function: "


class Part(NamedTuple):
    """A part of the model: of a layer, or of the whole where `layer` is None."""

    layer: int | None
    name: str


REST = Part(None, "the rest")
"""Forward and backward outside every range: losses, masks, positions."""


class Ranges:
    """The parts of one model, as long as `entered`."""

    def __init__(self) -> None:
        self.inside: list[Part] = [REST]
        self._spans: list[tuple[Part, int, list[int]]] = []
        self._open: list[tuple[Any, list[int]]] = []

    def enter(self, part: Part) -> None:
        """A part begins."""
        text = f"{PREFIX}{'' if part.layer is None else part.layer}/{part.name}"
        opened, end = record_function(text), [-1]
        opened.__enter__()
        self.inside.append(part)
        self._spans.append((part, _next_node(), end))
        self._open.append((opened, end))

    def leave(self) -> None:
        """The innermost part ends."""
        opened, end = self._open.pop()
        end[0] = _next_node()
        self.inside.pop()
        opened.__exit__(None, None, None)

    @contextmanager
    def part(self, layer: int | None, name: str) -> Iterator[None]:
        """As `enter` and `leave`."""
        self.enter(Part(layer, name))
        try:
            yield
        finally:
            self.leave()

    def forget(self) -> None:
        """Of an earlier step: its autograd nodes are gone."""
        self._spans.clear()

    def part_of_node(self) -> dict[int, Part]:
        """The innermost part in which each autograd node was made, by sequence number."""
        return {node: part for part, first, end in self._spans for node in range(first, end[0])}

    def seconds(self, events: Iterable[Any], cuda: bool = False) -> dict[tuple[Part, str], float]:
        """Seconds of each part without parts inside it, `forward` and `backward`, by the events of a profiler.

        On CPU wall-clock time of the thread that trains, waiting included; on CUDA time of its kernels.
        """
        nodes = self.part_of_node()
        found: dict[tuple[Part, str], float] = defaultdict(float)
        for event in events:
            part, inside = part_of(event), _owner(event, nodes)
            if cuda:
                owner = (part, "forward") if part is not None else inside
                if part is None and owner is not None:
                    found[owner] += event.self_device_time_total / 1e6
                continue
            is_node = event.name.startswith(BACKWARD)
            if part is None and not is_node:
                continue
            seconds = event.time_range.elapsed_us() / 1e6
            mine = (part, _direction(event)) if part is not None else (nodes.get(event.sequence_nr, REST), "backward")
            found[mine] += seconds
            if inside is not None:
                found[inside] -= seconds
        return dict(found)


def part_of(event: Any) -> Part | None:
    """The part that an event of the profiler is; None for any other event."""
    if not event.name.startswith(PREFIX):
        return None
    layer, _, name = event.name.removeprefix(PREFIX).partition("/")
    return Part(int(layer) if layer else None, name)


def _ancestors(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


def _direction(event: Any) -> str:
    return "backward" if any(above.name.startswith(BACKWARD) for above in _ancestors(event)) else "forward"


def _owner(event: Any, nodes: dict[int, Part]) -> tuple[Part, str] | None:
    """The nearest part or autograd node around an event."""
    for above in _ancestors(event):
        part = part_of(above)
        if part is not None:
            return part, _direction(above)
        if above.name.startswith(BACKWARD):
            return nodes.get(above.sequence_nr, REST), "backward"
    return None


def _next_node() -> int:
    return torch._C._autograd._get_sequence_nr()


class _RangedDispatcher:
    """Another dispatcher, with a range around each of its verbs."""

    def __init__(self, inner: Dispatcher, layer: int, ranges: Ranges) -> None:
        self.inner, self.layer, self.ranges = inner, layer, ranges

    def begin_dispatch(self, x_TD: Tensor, routing: Any, num_pieces: int = 1) -> list[Any]:
        with self.ranges.part(self.layer, "dispatch"):
            return self.inner.begin_dispatch(x_TD, routing, num_pieces)

    def end_dispatch(self, departed: Any) -> tuple[Tensor, Any]:
        with self.ranges.part(self.layer, "dispatch"):
            return self.inner.end_dispatch(departed)

    def begin_combine(self, rows_RD: Tensor, plan: Any) -> Any:
        with self.ranges.part(self.layer, "combine"):
            return self.inner.begin_combine(rows_RD, plan)

    def end_combine(self, returning: Any) -> Tensor:
        with self.ranges.part(self.layer, "combine"):
            return self.inner.end_combine(returning)


@contextmanager
def entered(model: Transformer, clock: Clock) -> Iterator[Ranges]:
    """Ranges around the parts of `model` and the all-to-alls that `clock` measures, until the end of the block."""
    ranges, handles, plain = Ranges(), [], clock.measure
    dispatchers: list[tuple[MoE, Dispatcher]] = []

    def around(module: nn.Module, part: Part) -> None:
        handles.append(module.register_forward_pre_hook(lambda *_: ranges.enter(part), prepend=True))
        handles.append(module.register_forward_hook(lambda *_: ranges.leave()))

    @contextmanager
    def measure(layer: int | None = None, way: Way = "dispatch") -> Iterator[None]:
        with ranges.part(layer, "all-to-all"), plain(layer, way):
            yield

    try:
        for name, module in model.named_modules():
            part = named_part(name, module)
            if part is not None:
                around(module, part)
            if isinstance(module, MoE):
                dispatchers.append((module, module.dispatcher))
                module.dispatcher = _RangedDispatcher(module.dispatcher, module.layer, ranges)
        clock.measure = measure  # type: ignore[method-assign]
        yield ranges
    finally:
        del clock.measure
        for moe, dispatcher in dispatchers:
            moe.dispatcher = dispatcher
        for handle in handles:
            handle.remove()


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (Block, "norms and residuals"),
    (Attention, "attention"),
    (MoE, "balance and shape"),
    (Router, "router"),
    ((Experts, ExpertList), "experts"),
)


def named_part(name: str, module: nn.Module) -> Part | None:
    """The part a module is, by its full name; None when it is only inside one."""
    if name in ("embed_tokens", "lm_head"):
        return Part(None, {"embed_tokens": "embedding", "lm_head": "output head"}[name])
    found = re.search(r"(?:^|\.)layers\.(\d+)", name)
    if found is None or ".experts." in name:
        return None
    if isinstance(module, SwiGLU):
        return Part(int(found[1]), "shared expert" if "shared_expert" in name else "dense feed-forward")
    return next((Part(int(found[1]), text) for kind, text in _KINDS if isinstance(module, kind)), None)


@contextmanager
def saved_for_backward(ranges: Ranges, owned: Iterable[Tensor]) -> Iterator[Callable[[], dict[Part, int]]]:
    """Bytes of tensors that autograd keeps from forward for backward, by the part that saves each first.

    Storages count once, and those of `owned` (weights) not at all. What backward itself saves (recomputation) does
    not count: close the block, or read the answer, before it.
    """
    seen = {_storage(tensor) for tensor in owned}
    found: dict[Part, int] = defaultdict(int)

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in seen and storage[1]:
            seen.add(storage)
            found[ranges.inside[-1]] += storage[1]
            kept.append(tensor)  # or its memory might be used again, and seem to be counted
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: dict(found)


def _storage(tensor: Tensor) -> tuple[int, int]:
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
