"""Experts of a person's own class: one module each, run one after the other.

Shape suffixes: R rows, D hidden, e experts held here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.models.noise import Sources, draws_noise, random_state_kept, seed_noise

SeedOf = Callable[[int], int]
"""Global expert id -> seed of its initial weights."""


class Expert(nn.Module):
    """Base class of a person's own expert: `__init__(hidden_size, intermediate_size)`, `forward` (R, D) ->
    (R, D).

    Any inner modules are fine. The rows of one call are tokens routed to this expert; R may be 0. Each row must be
    computed for itself: which ones come together changes with the layout of ranks. nn.Dropout is seen; a class that
    draws random numbers in another way sets `has_noise`, and then runs once for each micro-batch. The sizes may be left
    out of `super().__init__()`, which has no use for them.
    """

    has_noise = False

    def __init__(self, hidden_size: int | None = None, intermediate_size: int | None = None) -> None:
        super().__init__()

    def forward(self, x_RD: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}.forward: (R, D) -> (R, D)")


class _ZeroGradients(torch.autograd.Function):
    """Pass x through and give the parameters gradients of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
        wanted = zip(zeros, ctx.needs_input_grad[1:], strict=True)
        return grads[0], *(zero if want else None for zero, want in wanted)


class ExpertList(nn.Module):
    """Experts of a person's own class, run one after the other; named by global expert id. `held`: the ids of those in
    these places, which a placement moves (`parallel/engines/expert_moves.py`)."""

    comes_in_pieces = False
    """Of several calls for a micro-batch one may find an expert without rows and another not: torch's split backward,
    as of `zero_bubble`, then goes through the same node twice."""

    def __init__(self, make_expert: Callable[[], nn.Module], num_experts: int) -> None:
        super().__init__()
        self.make_expert = make_expert
        self.first_expert, self.num_local = 0, num_experts
        self.held: Sequence[int] = range(num_experts)
        self.experts = nn.ModuleDict({str(index): make_expert() for index in range(num_experts)})

    @property
    def kind(self) -> str:
        """Name of the class, for errors."""
        return type(self._any).__name__

    @property
    def draws_noise(self) -> bool:
        """Whether `forward` needs to know the sources of its rows."""
        return self.training and draws_noise(self._any)

    @property
    def _any(self) -> nn.Module:
        return next(iter(self.experts.values()))

    def forward(self, rows_RD: Tensor, rows_per_expert: Tensor, sources: Sources | None = None) -> Tensor:
        """(R, D) -> (R, D). `rows_per_expert` (e,) int64 sums to R: rows come sorted by local expert, and within it
        by `sources`. With those, every expert runs once for each that has rows for it, under a seed of their own.
        """
        if sources is None:
            chunks = rows_RD.split(rows_per_expert.tolist())
            return _joined([_run(expert, x) for expert, x in zip(self.experts.values(), chunks, strict=True)], rows_RD)
        out: list[Tensor] = []
        with random_state_kept(rows_RD.device):
            chunks_E = rows_RD.split((counts_ES := sources.rows_SE.t()).sum(1).tolist())
            each = zip(self.held, self.experts.values(), chunks_E, counts_ES.tolist(), strict=True)
            for number, expert, x_RD, counts in each:
                if not len(x_RD):
                    out.append(_run(expert, x_RD))
                for seed, part_RD in zip(sources.seeds, x_RD.split(counts), strict=True):
                    if len(part_RD):
                        seed_noise(seed + number, rows_RD.device)
                        out.append(_run(expert, part_RD))
        return _joined(out, rows_RD)

    def shard(self, first: int, count: int) -> None:
        """Keep only `count` experts from global id `first` on."""
        self.experts = nn.ModuleDict({str(index): self.experts[str(index)] for index in range(first, first + count)})
        self.first_expert, self.num_local, self.held = first, count, range(first, first + count)

    def initialize(self, seed_of: SeedOf, std: float) -> None:
        """Build each expert anew as its class does, under its own seed."""
        like = next(chain(self.parameters(), self.buffers()), torch.empty(0))
        dtype = like.dtype if like.is_floating_point() else None
        for key in self.experts:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed_of(int(key)))
                self.experts[key] = self.make_expert().to(like.device, dtype)


def _joined(parts_RD: list[Tensor], rows_RD: Tensor) -> Tensor:
    """All rows in one dtype, whatever a class answers with or without rows: other ranks expect it of what arrives."""
    device = rows_RD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows_RD.dtype
    return torch.cat([part_RD.to(dtype) for part_RD in parts_RD])


def _run(expert: nn.Module, x_RD: Tensor) -> Tensor:
    if len(x_RD):
        return expert(x_RD)
    # FSDP reduces what has a gradient: without zeros, ranks would sum gradients of different experts. They hang on the
    # input, as one node: on the output, a schedule that splits backward would come by it once for each inner module.
    with torch.no_grad():
        out_RD = expert(x_RD)
    return _ZeroGradients.apply(x_RD, *expert.parameters()).to(out_RD.dtype)


def check_stack(experts: nn.Module, num_experts: int) -> None:
    """A subclass of `Experts` must hold nothing but one row per expert, or a layout of ranks would change it.

    Raises ValueError naming the parameter or buffer.
    """
    kind = type(experts).__name__
    for name, parameter in experts.named_parameters():
        if "." in name or parameter.shape[:1] != (num_experts,):
            raise ValueError(
                f"model.expert: {kind}.{name} is {list(parameter.shape)}; a parameter of stacked experts belongs to "
                f"the class itself and has one row per expert, [{num_experts}, ...]"
            )
    for name, buffer in experts.named_buffers():
        if buffer.shape[:1] == (num_experts,):
            raise ValueError(
                f"model.expert: {kind}.{name} is a buffer with one row per expert, which would not be cut with them; "
                "make it nn.Parameter(..., requires_grad=False)"
            )
