"""Bugs in how engines of others, FSDP and DeepSpeed, are made to sum gradients as ours does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moe_dist.models.experts import ExpertList, Experts
from moe_dist.parallel.engines import deepspeed
from moe_dist.parallel.engines.deepspeed import DeepSpeedEngine
from moe_dist.verify.injected_bugs.planting import Replace


def fsdp_averages(replace: Replace) -> None:
    """FSDP as it comes: gradients divided by the number of ranks that share a parameter."""
    replace(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)


def fsdp_averages_experts(replace: Replace) -> None:
    """The rest is summed, experts are averaged over the ranks that hold them."""
    divide = FSDPModule.set_gradient_divide_factor

    def wrong(self: FSDPModule, factor: float) -> None:
        if not isinstance(self, (Experts, ExpertList)):
            divide(self, factor)

    replace(FSDPModule, "set_gradient_divide_factor", wrong)


def deepspeed_averages(replace: Replace) -> None:
    """DeepSpeed as it comes: gradients divided by the number of replicas."""
    settings = deepspeed.deepspeed_settings

    replace(deepspeed, "deepspeed_settings", lambda c: settings(c) | {"gradient_allreduce_op": "mean"})


def deepspeed_averages_experts(replace: Replace) -> None:
    """The rest is summed, experts are averaged over the ranks that hold them."""
    reduce = DeepSpeedEngine.reduce

    def wrong(self: DeepSpeedEngine) -> None:
        reduce(self)
        for index, is_expert in enumerate(self.zero_optimizer.is_moe_param_group):
            if is_expert:
                torch._foreach_div_(list(self.zero_optimizer.averaged_gradients[index]), self.mesh.layout.edp_size)

    replace(DeepSpeedEngine, "reduce", wrong)


def deepspeed_knows_no_experts(replace: Replace) -> None:
    """Parameters of different experts reduced over all replicas, as if they were copies of one."""
    register = DeepSpeedEngine._register_groups

    def wrong(self: DeepSpeedEngine) -> None:
        register(self)
        self.expert_names = set()
        self.model.expert_parameter_names = set  # type: ignore[method-assign]

    replace(DeepSpeedEngine, "_register_groups", wrong)


def deepspeed_divides_by_accumulation(replace: Replace) -> None:
    """DeepSpeed divides a loss by its gradient_accumulation_steps; ours is divided by tokens already."""

    def wrong(self: DeepSpeedEngine, loss: Tensor) -> None:
        self.engine._config.gradient_accumulation_steps = 2
        self.engine.backward(self.engine(loss))

    replace(DeepSpeedEngine, "backward", wrong)
