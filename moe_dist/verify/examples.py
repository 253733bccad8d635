"""Routers and experts of a person's own, as the documentation shows them: the proof trains them in every layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.models.experts import Expert, Experts
from moe_dist.models.router import Router


class TemperedRouter(Router):
    """Logits of two linear maps, divided by a learned temperature."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int = 2) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.temperature = nn.Parameter(torch.ones(1))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.2)
        nn.init.ones_(self.temperature)

    def logits(self, x_TD: Tensor) -> Tensor:
        return super().logits(F.silu(self.inner(x_TD))) / self.temperature


class FailingRouter(Router):
    """Its gate fails for some tokens."""

    def logits(self, x_TD: Tensor) -> Tensor:
        return super().logits(x_TD).masked_fill(x_TD[:, :1] > 0.5, float("nan"))


class TwoLinears(Expert):
    """Several modules; nothing is computed without rows, so that they then have no gradient at all."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x_RD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_RD))) if len(x_RD) else x_RD


class NoisyExpert(TwoLinears):
    """With dropout, which must fall on the same values in every layout, and a buffer."""

    scale: Tensor

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, x_RD: Tensor) -> Tensor:
        return self.down(self.dropout(F.gelu(self.up(x_RD)))) * self.scale.to(x_RD.dtype)


class BiasedExperts(Experts):
    """All experts in stacked weights, with stacked (E, D) biases beside the stacked (E, D, F) matrices."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size)
        self.bias = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def initialize(self, seed_of: Any, std: float) -> None:
        super().initialize(seed_of, std)
        with torch.no_grad():
            for index in range(self.num_local):
                generator = torch.Generator().manual_seed(seed_of(self.first_expert + index) + 1)
                self.bias[index].copy_(torch.empty(self.bias.shape[1]).normal_(0.0, std, generator=generator))

    def forward(self, rows_RD: Tensor, rows_per_expert: Tensor) -> Tensor:  # type: ignore[override]  # without adapters
        out_RD = super().forward(rows_RD, rows_per_expert)
        expert_R = torch.repeat_interleave(rows_per_expert, output_size=len(rows_RD))
        return out_RD + self.bias.to(out_RD.dtype)[expert_R]
