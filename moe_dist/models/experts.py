"""Many experts as one module: rows sorted by expert in, rows out.

Shape suffixes: R rows, D hidden, F intermediate, e experts held here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_dist.config import ModelConfig
from moe_dist.models.noise import refuse_stray_noise
from moe_dist.models.own_experts import Expert as Expert
from moe_dist.models.own_experts import ExpertList, SeedOf, check_stack
from moe_dist.models.registry import Registry


class Experts(nn.Module):
    """SwiGLU experts as stacked 3-D weights, run by grouped matmuls.

    `w_gate_up` (e, D, 2F), gate first; `w_down` (e, F, D). This module holds the experts
    [first_expert, first_expert + num_local): all of them until `shard` keeps some. A subclass may have more parameters:
    each is stacked too, (num_experts, ...), whatever its other dimensions, and none is in an inner module.
    """

    draws_noise = False

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.first_expert, self.num_local = 0, num_experts
        self.w_gate_up = nn.Parameter(torch.empty(num_experts, hidden_size, 2 * intermediate_size))
        self.w_down = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))

    def forward(self, rows_RD: Tensor, rows_per_expert: Tensor) -> Tensor:
        """(R, D) -> (R, D). `rows_per_expert` (e,) int64 sums to R: rows come sorted by local expert."""
        if torch.is_autocast_enabled(rows_RD.device.type):
            dtype = torch.get_autocast_dtype(rows_RD.device.type)
        else:
            dtype = self.w_down.dtype
        rows_RD = rows_RD.to(dtype)
        w_gate_up, w_down = self.w_gate_up.to(dtype), self.w_down.to(dtype)
        if rows_RD.device.type == "cpu":
            return _LoopedSwiGLU.apply(rows_RD, w_gate_up, w_down, rows_per_expert.tolist())
        if rows_RD.shape[0] == 0:
            # Keeps every expert in the graph: its gradient is zero, not None, when no token came.
            return swiglu(rows_RD @ w_gate_up[0]) @ w_down[0]
        return grouped_swiglu(rows_RD, w_gate_up, w_down, rows_per_expert.cumsum(0).to(torch.int32))

    @property
    def kind(self) -> str:
        """Name of the class, for errors."""
        return type(self).__name__

    def shard(self, first: int, count: int) -> None:
        """Keep only `count` experts from global id `first` on."""
        start = first - self.first_expert
        for name, parameter in list(self.named_parameters(recurse=False)):
            kept = parameter.detach()[start : start + count].clone()
            setattr(self, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        self.first_expert, self.num_local = first, count

    @torch.no_grad()
    def initialize(self, seed_of: SeedOf, std: float) -> None:
        """Each expert from its own seed, equal in every layout: matrices normal, vectors and numbers zero."""
        for index in range(self.num_local):
            generator = torch.Generator().manual_seed(seed_of(self.first_expert + index))
            for parameter in self.parameters():
                if parameter.ndim > 2:
                    parameter[index].copy_(torch.empty(parameter.shape[1:]).normal_(0.0, std, generator=generator))
                else:
                    parameter[index].zero_()


class LoopExperts(Experts):
    """The specification of `Experts`: one expert after the other, plain matmuls."""

    def forward(self, rows_RD: Tensor, rows_per_expert: Tensor) -> Tensor:
        # unbind once: indexing weight[e] in the loop would build a full-size zero gradient per expert.
        weights = zip(self.w_gate_up.unbind(0), self.w_down.unbind(0), strict=True)
        chunks = rows_RD.split(rows_per_expert.tolist())
        return torch.cat([swiglu(x @ gate_up) @ down for x, (gate_up, down) in zip(chunks, weights, strict=True)])


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _swiglu_backward(grad_hidden: Tensor, gate_up: Tensor, hidden: Tensor, grad_gate_up: Tensor) -> None:
    """Write swiglu(gate_up) to `hidden` and its gradient to `grad_gate_up`; `grad_hidden` is used up."""
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=hidden)
    torch.mul(grad_hidden, hidden, out=grad_up)
    hidden.mul_(up)
    torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=grad_gate)


class _SwiGLU(torch.autograd.Function):
    """`swiglu` that keeps nothing but its input for backward."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad_gate_up = torch.empty_like(gate_up)
        _swiglu_backward(grad_hidden.clone(), gate_up, torch.empty_like(grad_hidden), grad_gate_up)
        return grad_gate_up


def grouped_swiglu(rows_RD: Tensor, w_gate_up: Tensor, w_down: Tensor, offsets: Tensor) -> Tensor:
    """All experts in two grouped matmuls: the way of accelerators, without a host synchronisation. R > 0."""
    out = grouped_mm(_SwiGLU.apply(grouped_mm(rows_RD, w_gate_up, offsets)), w_down, offsets)
    if out.requires_grad:
        out.register_hook(Tensor.contiguous)  # the kernel's backward refuses expanded gradients, as of a sum
    return out


def grouped_mm(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """rows[offsets[e-1]:offsets[e]] @ weights[e] for every e; offsets[-1] must be the number of rows."""
    aligned = all(size * rows.element_size() % 16 == 0 for size in weights.shape[1:])
    if aligned and rows.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return torch._grouped_mm(rows, weights, offs=offsets)
    chunks = rows.tensor_split(offsets[:-1].long().cpu())
    return torch.cat([chunk @ weight for chunk, weight in zip(chunks, weights.unbind(0), strict=True)])


_ROWS_AT_ONCE = 512


class _LoopedSwiGLU(torch.autograd.Function):
    """All experts, one after the other, with a small scratch that stays in the CPU's cache.

    Fresh memory costs a CPU as much as a third of the matmuls (`memory.py`). So results go straight to their
    place, and only gate_up is kept for backward, where the hidden activation is made again. The activation is
    computed for as many experts together as fill the scratch: calls cost, too.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, w_gate_up: Tensor, w_down: Tensor, counts: list[int]) -> Tensor:
        gate_up_R = rows_RD.new_empty(rows_RD.shape[0], w_gate_up.shape[2])
        out_RD = rows_RD.new_empty(rows_RD.shape)
        rows, gate_up, out = (tensor.split(counts) for tensor in (rows_RD, gate_up_R, out_RD))
        up_weights, down_weights = w_gate_up.unbind(0), w_down.unbind(0)
        groups = _groups(counts)
        scratch = rows_RD.new_empty(_longest(groups), w_down.shape[1])
        for experts, here in groups:
            for e in experts:
                torch.mm(rows[e], up_weights[e], out=gate_up[e])
            gate, up = gate_up_R[here].chunk(2, dim=-1)
            hidden = torch.ops.aten.silu.out(gate, out=scratch[: gate.shape[0]]).mul_(up)
            for e, part in zip(experts, hidden.split([counts[e] for e in experts]), strict=True):
                torch.mm(part, down_weights[e], out=out[e])
        ctx.save_for_backward(rows_RD, gate_up_R, w_gate_up, w_down)
        ctx.counts = counts
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows_RD, gate_up_R, w_gate_up, w_down = ctx.saved_tensors
        counts, (want_rows, want_up, want_down, _) = ctx.counts, ctx.needs_input_grad
        results = [torch.empty_like(tensor) for tensor in (rows_RD, w_gate_up, w_down)]
        rows, grads, to_rows = (t.split(counts) for t in (rows_RD, grad_RD.contiguous(), results[0]))
        up_weights, down_weights, to_up, to_down = (t.unbind(0) for t in (w_gate_up, w_down, *results[1:]))
        for e in (e for e, count in enumerate(counts) if count == 0):
            to_up[e].zero_()
            to_down[e].zero_()
        groups, width = _groups(counts), w_down.shape[1]
        scratch = [grad_RD.new_empty(_longest(groups), size) for size in (width, width, 2 * width)]
        for experts, here in groups:
            grad_hidden, hidden, grad_gate_up = (tensor[: here.stop - here.start] for tensor in scratch)
            sizes = [counts[e] for e in experts]
            for e, part in zip(experts, grad_hidden.split(sizes), strict=True):
                torch.mm(grads[e], down_weights[e].t(), out=part)
            _swiglu_backward(grad_hidden, gate_up_R[here], hidden, grad_gate_up)
            for e, h, grad in zip(experts, hidden.split(sizes), grad_gate_up.split(sizes), strict=True):
                if want_rows:
                    torch.mm(grad, up_weights[e].t(), out=to_rows[e])
                if want_up:
                    torch.mm(rows[e].t(), grad, out=to_up[e])
                if want_down:
                    torch.mm(h.t(), grads[e], out=to_down[e])
        wanted = (want_rows, want_up, want_down)
        d_rows, d_up, d_down = (result if want else None for result, want in zip(results, wanted, strict=True))
        return d_rows, d_up, d_down, None


def _groups(counts: list[int]) -> list[tuple[list[int], slice]]:
    """Neighbouring experts with rows, about _ROWS_AT_ONCE together, and where their rows are."""
    groups: list[tuple[list[int], slice]] = []
    experts: list[int] = []
    start = end = 0
    for expert, count in enumerate(counts):
        if experts and end - start + count > _ROWS_AT_ONCE:
            groups.append((experts, slice(start, end)))
            experts, start = [], end
        if count:
            experts.append(expert)
            end += count
    return [*groups, (experts, slice(start, end))] if experts else groups


def _longest(groups: list[tuple[list[int], slice]]) -> int:
    return max((here.stop - here.start for _, here in groups), default=0)


EXPERTS: Registry[Callable[..., nn.Module]] = Registry("model.expert", "expert")
register_expert = EXPERTS.register
EXPERTS.register("swiglu")(Experts)
EXPERTS.register("swiglu_loop")(LoopExperts)


def build_experts(config: ModelConfig) -> Experts | ExpertList:
    """The configured experts of one layer, all of them.

    Raises ValueError for stacked experts that hold what is not one per expert.
    """
    kind: Any = EXPERTS.resolve(config.expert)
    sizes = (config.hidden_size, config.moe_intermediate_size)
    if not (isinstance(kind, type) and issubclass(kind, Experts)):
        return refuse_stray_noise(ExpertList(lambda: kind(*sizes), config.num_experts))
    experts = kind(config.num_experts, *sizes)
    if kind in (Experts, LoopExperts):
        return experts
    check_stack(experts, config.num_experts)
    return refuse_stray_noise(experts)
