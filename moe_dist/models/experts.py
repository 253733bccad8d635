"""Many experts as one module: rows sorted by expert in, rows out.

Shape suffixes: R rows, D hidden, F intermediate, e experts held here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.models.registry import Registry

SeedOf = Callable[[int], int]
"""Global expert id -> seed of its initial weights."""


class Experts(nn.Module):
    """SwiGLU experts as stacked 3-D weights, run by grouped matmuls.

    `w_gate_up` (e, D, 2F), gate first; `w_down` (e, F, D). This module holds the experts
    [first_expert, first_expert + num_local): all of them until `shard` keeps some.
    """

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
        if rows_RD.shape[0] == 0:
            # Keeps every expert in the graph: its gradient is zero, not None, when no token came.
            return swiglu(rows_RD @ w_gate_up[0]) @ w_down[0]
        offsets = rows_per_expert.cumsum(0).to(torch.int32)
        return grouped_mm(swiglu(grouped_mm(rows_RD, w_gate_up, offsets)), w_down, offsets)

    def shard(self, first: int, count: int) -> None:
        """Keep only `count` experts from global id `first` on."""
        start = first - self.first_expert
        for name, parameter in list(self.named_parameters(recurse=False)):
            kept = parameter.detach()[start : start + count].clone()
            setattr(self, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        self.first_expert, self.num_local = first, count

    @torch.no_grad()
    def initialize(self, seed_of: SeedOf, std: float) -> None:
        """Normal weights, each expert from its own seed: equal in every layout, no two alike."""
        for index in range(self.num_local):
            generator = torch.Generator().manual_seed(seed_of(self.first_expert + index))
            for parameter in (self.w_gate_up, self.w_down):
                parameter[index].copy_(
                    torch.empty(parameter.shape[1:]).normal_(0.0, std, generator=generator)
                )


class LoopExperts(Experts):
    """The specification of `Experts`: one expert after the other, plain matmuls."""

    def forward(self, rows_RD: Tensor, rows_per_expert: Tensor) -> Tensor:
        # unbind once: indexing weight[e] in the loop would build a full-size zero gradient per expert.
        weights = zip(self.w_gate_up.unbind(0), self.w_down.unbind(0), strict=True)
        chunks = rows_RD.split(rows_per_expert.tolist())
        return torch.cat(
            [swiglu(x @ gate_up) @ down for x, (gate_up, down) in zip(chunks, weights, strict=True)]
        )


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_mm(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """rows[offsets[e-1]:offsets[e]] @ weights[e] for every e; offsets[-1] must be the number of rows."""
    aligned = all(size * rows.element_size() % 16 == 0 for size in (*weights.shape[1:],))
    if aligned and rows.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return torch._grouped_mm(rows, weights, offs=offsets)
    chunks = rows.tensor_split(offsets[:-1].cpu())
    return torch.cat([chunk @ weight for chunk, weight in zip(chunks, weights.unbind(0), strict=True)])


class Expert(nn.Module):
    """Base class of a person's own expert: `__init__(hidden_size, intermediate_size)`, `forward` (R, D) ->
    (R, D).

    Any inner modules are fine. The rows of one call are the tokens routed to this expert; R may be 0.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()

    def forward(self, x_RD: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}.forward: (R, D) -> (R, D)")


class ExpertList(nn.Module):
    """Experts of a person's own class, run one after the other; named by global expert id."""

    def __init__(self, make_expert: Callable[[], nn.Module], num_experts: int) -> None:
        super().__init__()
        self.make_expert = make_expert
        self.first_expert, self.num_local = 0, num_experts
        self.experts = nn.ModuleDict({str(index): make_expert() for index in range(num_experts)})

    def forward(self, rows_RD: Tensor, rows_per_expert: Tensor) -> Tensor:
        chunks = rows_RD.split(rows_per_expert.tolist())
        return torch.cat([expert(x) for expert, x in zip(self.experts.values(), chunks, strict=True)])

    def shard(self, first: int, count: int) -> None:
        """Keep only `count` experts from global id `first` on."""
        self.experts = nn.ModuleDict(
            {str(index): self.experts[str(index)] for index in range(first, first + count)}
        )
        self.first_expert, self.num_local = first, count

    def initialize(self, seed_of: SeedOf, std: float) -> None:
        """Build each expert anew as its class does, under its own seed."""
        like = next(self.parameters(), torch.empty(0))
        for key in self.experts:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(int(key)))
                self.experts[key] = self.make_expert().to(like.device, like.dtype)


EXPERTS: Registry[Callable[..., nn.Module]] = Registry("model.expert", "expert")
register_expert = EXPERTS.register
EXPERTS.register("swiglu")(Experts)
EXPERTS.register("swiglu_loop")(LoopExperts)


def build_experts(config: ModelConfig) -> Experts | ExpertList:
    """The configured experts of one layer, all of them."""
    kind: Any = EXPERTS.resolve(config.expert)
    sizes = (config.hidden_size, config.moe_intermediate_size)
    if isinstance(kind, type) and issubclass(kind, Experts):
        return kind(config.num_experts, *sizes)
    return ExpertList(lambda: kind(*sizes), config.num_experts)
