"""A person's own class of stacked experts, with more than matrices: `model.expert=stacked:WithVectors`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dist.models.experts import Experts


class WithVectors(Experts):
    """Every expert has a shift (D,) and a scale () besides its matrices."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size)
        self.shift = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.scale = nn.Parameter(torch.empty(num_experts))

    def forward(self, rows_RD: Tensor, rows_per_expert: Tensor) -> Tensor:
        expert_R = torch.arange(self.num_local).repeat_interleave(rows_per_expert)
        scale_R, shift_RD = self.scale[expert_R].to(rows_RD.dtype), self.shift[expert_R].to(rows_RD.dtype)
        return super().forward(rows_RD, rows_per_expert) * (1 + scale_R[:, None]) + shift_RD
