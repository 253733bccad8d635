"""Many experts as one module: rows sorted by expert in, rows out.

Shape suffixes: R rows, D hidden, F intermediate, e experts held here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.models.adapted_experts import AdaptedSwiGLU
from moe_dist.models.grouped import StackedLowRank, grouped_mm_takes, multiply_one_by_one, multiply_rows
from moe_dist.models.noise import Sources, refuse_stray_noise
from moe_dist.models.own_experts import Expert as Expert
from moe_dist.models.own_experts import ExpertList, SeedOf, check_stack
from moe_dist.models.quantized import QuantizedWeight, TimesQuantized
from moe_dist.models.registry import Registry
from moe_dist.models.swiglu import GroupedSwiGLU, loop_swiglu, swiglu, swiglu_backward


class CopiedWeights(Protocol):
    """Copies of experts that other ranks own, and of own ones, for one forward pass (`parallel/expert_copies.py`)."""

    def depart(self, w_gate_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stacks as they are to be used by their own rows, and copies on their way."""
        ...

    def arrive(self, departed: Tensor) -> tuple[Tensor, Tensor]:
        """The stacks of the copies."""
        ...


class CopiedRows(NamedTuple):
    """Rows (R, D) sorted by copied expert, how many of each, and the copies. A tuple: FSDP looks into no other."""

    rows_RD: Tensor
    rows_per_expert: Tensor
    weights: CopiedWeights


class Experts(nn.Module):
    """SwiGLU experts as stacked 3-D weights, run by grouped matmuls. `hidden_act`: a name of `layers.ACTIVATIONS`.

    `w_gate_up` (e, D, 2F), gate first; `w_down` (e, F, D). This module holds the experts
    [first_expert, first_expert + num_local): all of them until `shard` keeps some. A subclass may have more parameters:
    each is stacked too, (num_experts, ...), whatever its other dimensions, and none is in an inner module. `held`: the
    global ids of the experts in the rows, which a placement moves (`parallel/engines/expert_moves.py`).
    """

    chunk_rows = 0
    """Rows above which they come in chunks (`train.expert_chunk_factor`); 0: never."""
    kernels = "torch"
    """By which the gated unit is computed (`train.kernels`)."""
    precision = "compute"
    """Of products of rows with weights (`train.expert_precision`)."""
    lora_gate_up: StackedLowRank | None
    lora_down: StackedLowRank | None

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.first_expert, self.num_local = 0, num_experts
        self.held: Sequence[int] = range(num_experts)
        self.hidden_act = "silu"
        self.lora_gate_up = self.lora_down = None
        self.w_gate_up = nn.Parameter(torch.empty(num_experts, hidden_size, 2 * intermediate_size))
        self.w_down = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))

    def forward(
        self,
        rows_RD: Tensor,
        rows_per_expert: Tensor,
        sources: Sources | None = None,
        copied: CopiedRows | None = None,
    ) -> Any:
        """(R, D) -> (R, D). `rows_per_expert` (e,) int64 sums to R: rows come sorted by local expert, and where
        `draws_noise` by `sources` within it. With `copied` rows, theirs are a second answer."""
        dtype = self.compute_dtype(rows_RD)
        rows_RD = rows_RD.to(dtype)
        is_frozen = self.is_adapted or self.is_quantized
        if is_frozen and (not len(rows_RD) or not self._adapters_are_grouped(dtype)):
            return self.in_parts(rows_RD, rows_per_expert, sources)
        if is_frozen:
            return self._with_adapters(rows_RD, _offsets(rows_per_expert))
        gate_up, down = self.w_gate_up.to(dtype), self.w_down.to(dtype)
        if copied is None:
            return self._swiglu(rows_RD, gate_up, down, rows_per_expert)
        gate_up, down, departed = copied.weights.depart(gate_up, down)
        out_RD = self._swiglu(rows_RD, gate_up, down, rows_per_expert)  # while copies are on their way
        copies = copied.weights.arrive(departed)
        return out_RD, self._swiglu(copied.rows_RD.to(dtype), *copies, copied.rows_per_expert)

    def _swiglu(self, rows_RD: Tensor, w_gate_up: Tensor, w_down: Tensor, rows_per_expert: Tensor) -> Tensor:
        if self.precision == "compute" and not grouped_mm_takes(rows_RD.dtype, w_down.shape[1:]):
            return loop_swiglu(rows_RD, w_gate_up, w_down, rows_per_expert, self.hidden_act)
        how = _offsets(rows_per_expert), self.hidden_act, self.kernels, self.chunk_rows, self.precision
        return GroupedSwiGLU.apply(rows_RD, w_gate_up, w_down, *how)

    def _adapters_are_grouped(self, dtype: torch.dtype) -> bool:
        """Whether the kernel takes the sizes of the experts and the ranks beside them, and no row is dropped out."""
        ranks = [adapter.A.shape[2] for adapter in (self.lora_gate_up, self.lora_down) if adapter is not None]
        return not self.draws_noise and grouped_mm_takes(dtype, (*self.w_down.shape[1:], *ranks))

    def _with_adapters(self, rows_RD: Tensor, offsets: Tensor) -> Tensor:
        dtype = rows_RD.dtype
        weights = [w if isinstance(w, QuantizedWeight) else w.to(dtype) for w in (self.w_gate_up, self.w_down)]
        matrices: list[Tensor | None] = []
        for adapter in (self.lora_gate_up, self.lora_down):
            both = (None, None) if adapter is None else (adapter.A.to(dtype), adapter.B.to(dtype))
            matrices.extend(both)
        scales = [adapter.scale for adapter in (self.lora_gate_up, self.lora_down) if adapter is not None]
        backward = partial(swiglu_backward, activation=self.hidden_act, kernels=self.kernels)
        return AdaptedSwiGLU.apply(rows_RD, *weights, *matrices, offsets, max(scales, default=1.0), self.unit, backward)

    def in_parts(self, rows_RD: Tensor, rows_per_expert: Tensor, sources: Sources | None) -> Tensor:
        """As `forward`, one step after the other: with biases and adapters, where there are any."""
        gate_up = self._project("gate_up", rows_RD, rows_per_expert, sources)
        return self._project("down", self.unit(gate_up), rows_per_expert, sources)

    def unit(self, gate_up: Tensor) -> Tensor:
        """(R, 2F), gate first -> (R, F)."""
        return swiglu(gate_up, self.hidden_act, self.kernels)

    def _project(self, stack: str, rows_RX: Tensor, rows_per_expert: Tensor, sources: Sources | None) -> Tensor:
        weight = getattr(self, f"w_{stack}")
        if isinstance(weight, QuantizedWeight):
            out = TimesQuantized.apply(rows_RX, weight, lambda rows, whole: self.multiply(rows, whole, rows_per_expert))
        else:
            out = self.multiply(rows_RX, weight.to(rows_RX.dtype), rows_per_expert)
        if (bias := getattr(self, f"b_{stack}", None)) is not None:
            out = out + bias.to(out.dtype)[torch.repeat_interleave(rows_per_expert, output_size=len(out))]
        lora = getattr(self, f"lora_{stack}")
        return out if lora is None else out + lora(rows_RX, rows_per_expert, sources, self.held, self.multiply)

    multiply = staticmethod(multiply_rows)

    def compute_dtype(self, rows_RD: Tensor) -> torch.dtype:
        """That of autocast, or of the weights."""
        if torch.is_autocast_enabled(rows_RD.device.type):
            return torch.get_autocast_dtype(rows_RD.device.type)
        return rows_RD.dtype if isinstance(self.w_down, QuantizedWeight) else self.w_down.dtype

    @property
    def is_adapted(self) -> bool:
        """Whether there are adapters beside the weights."""
        return self.lora_gate_up is not None or self.lora_down is not None

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are in few bits."""
        return isinstance(self.w_down, QuantizedWeight)

    @property
    def draws_noise(self) -> bool:
        """Whether `forward` needs to know the sources of its rows."""
        adapters = (self.lora_gate_up, self.lora_down)
        return self.training and any(adapter is not None and adapter.dropout for adapter in adapters)

    @property
    def comes_in_pieces(self) -> bool:
        """Whether rows of a micro-batch may come in several calls; what is drawn at random is drawn once for all."""
        return not self.draws_noise

    @property
    def kind(self) -> str:
        """Name of the class, for errors."""
        return type(self).__name__

    @property
    def casts_rows(self) -> bool:
        """Whether `forward` begins by casting rows to the dtype of autocast: then they may travel in it."""
        return type(self).forward in (Experts.forward, ClampedExperts.forward)

    def shard(self, first: int, count: int) -> None:
        """Keep only `count` experts from global id `first` on."""
        start = first - self.first_expert
        for holder in (self, self.lora_gate_up, self.lora_down):
            for name, parameter in list(holder.named_parameters(recurse=False)) if holder is not None else ():
                kept = parameter.detach()[start : start + count].clone()
                setattr(holder, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        self.first_expert, self.num_local, self.held = first, count, range(first, first + count)

    @torch.no_grad()
    def initialize(self, seed_of: SeedOf, std: float) -> None:
        """Each expert from its own seed, equal in every layout: matrices normal, vectors and numbers zero."""
        for index in range(self.num_local):
            generator = torch.Generator().manual_seed(seed_of(self.first_expert + index))
            for parameter in self.parameters(recurse=False):
                if parameter.ndim > 2:
                    parameter[index].copy_(torch.empty(parameter.shape[1:]).normal_(0.0, std, generator=generator))
                else:
                    parameter[index].zero_()


def _offsets(rows_per_expert: Tensor) -> Tensor:
    """Where every expert's rows end. The last must be the number of rows: the kernel leaves what lies past it as it was
    in memory."""
    return rows_per_expert.cumsum(0).to(torch.int32)


class LoopExperts(Experts):
    """The specification of `Experts`: one expert after the other, plain matmuls."""

    multiply = staticmethod(multiply_one_by_one)

    def forward(  # type: ignore[override]  # no copies: the configuration has them of `Experts` alone
        self, rows_RD: Tensor, rows_per_expert: Tensor, sources: Sources | None = None
    ) -> Tensor:
        if self.is_adapted or self.is_quantized:
            return self.in_parts(rows_RD.to(self.compute_dtype(rows_RD)), rows_per_expert, sources)
        return loop_swiglu(rows_RD, self.w_gate_up, self.w_down, rows_per_expert, self.hidden_act)


class ClampedExperts(Experts):
    """The experts of gpt-oss: biases on both matrices, and a gated unit whose inputs are clamped.

    gate * sigmoid(1.702 gate) * (up + 1), gate at most 7 and up within 7 of zero. `b_gate_up` (e, 2F), `b_down` (e, D).
    """

    ALPHA, LIMIT = 1.702, 7.0

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size)
        self.b_gate_up = nn.Parameter(torch.zeros(num_experts, 2 * intermediate_size))
        self.b_down = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def forward(  # type: ignore[override]  # no copies: the configuration has them of `Experts` alone
        self, rows_RD: Tensor, rows_per_expert: Tensor, sources: Sources | None = None
    ) -> Tensor:
        return self.in_parts(rows_RD.to(self.compute_dtype(rows_RD)), rows_per_expert, sources)

    def unit(self, gate_up: Tensor) -> Tensor:
        """(R, 2F), gate first -> (R, F)."""
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.LIMIT), up.clamp(-self.LIMIT, self.LIMIT)
        return gate * (gate * self.ALPHA).sigmoid() * (up + 1)


EXPERTS: Registry[Callable[..., nn.Module]] = Registry("model.expert", "expert")
register_expert = EXPERTS.register
EXPERTS.register("swiglu")(Experts)
EXPERTS.register("swiglu_loop")(LoopExperts)
EXPERTS.register("swiglu_clamped")(ClampedExperts)


def build_experts(config: ModelConfig) -> Experts | ExpertList:
    """The configured experts of one layer, all of them.

    Raises ValueError for stacked experts that hold what is not one per expert.
    """
    kind: Any = EXPERTS.resolve(config.expert)
    sizes = (config.hidden_size, config.moe_intermediate_size)
    if not (isinstance(kind, type) and issubclass(kind, Experts)):
        return refuse_stray_noise(ExpertList(lambda: kind(*sizes), config.num_experts))
    experts = kind(config.num_experts, *sizes)
    if kind in (Experts, LoopExperts):  # a subclass may have something else of that name
        experts.hidden_act = config.hidden_act
    if kind in (Experts, LoopExperts, ClampedExperts):
        return experts
    check_stack(experts, config.num_experts)
    return refuse_stray_noise(experts)
