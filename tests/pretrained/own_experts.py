"""Experts and a router that no Hugging Face family has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dist.models.experts import Expert, Experts
from moe_dist.models.router import Router


class Squared(Expert):
    """Two matrices around a squared ReLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().square())


class Stack(Experts):
    """One more number for each expert."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size)
        self.scale = nn.Parameter(torch.ones(num_experts))

    def forward(self, rows_RD: Tensor, rows_per_expert: Tensor) -> Tensor:
        expert_R = torch.repeat_interleave(rows_per_expert, output_size=len(rows_RD))
        return super().forward(rows_RD, rows_per_expert) * (1 + self.scale[expert_R])[:, None]


class Biased(Router):
    """A map through a narrower space, and a number without a dimension."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts)
        self.narrow = nn.Linear(hidden_size, hidden_size)
        self.sharpness = nn.Parameter(torch.tensor(5.0))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.constant_(self.sharpness, 5.0)

    def logits(self, x_TD: Tensor) -> Tensor:
        return super().logits(self.narrow(x_TD)) * self.sharpness
