"""Sharded data parallelism: parameters cut over replicas by FSDP2, dense ones over dp, experts over edp.

Stages of ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054):

1. Whole gradients are kept while micro-batches accumulate, then reduced into shards; optimizer state is sharded.
2. Every micro-batch's gradients are reduced into shards at once.
3. Parameters are freed after forward and gathered again for backward, in every micro-batch; before that, once a step.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from moe_dist.config import Config
from moe_dist.models.experts import Experts
from moe_dist.models.precision import full_dtype
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.dtensor_layout import stack_placement
from moe_dist.parallel.engines.optimizer import LogicalOptimizer, TorchEngine, local, reshard
from moe_dist.parallel.mesh import Mesh


def shard_parameters(model: Transformer, config: Config, mesh: Mesh) -> None:
    """Wrap blocks, their experts and their routers, in place. Reductions are sums; no factor anywhere."""
    dense_mesh, expert_mesh = _meshes(mesh)
    frees = config.parallel.zero_stage == 3
    offload = CPUOffloadPolicy() if config.parallel.cpu_offload else OffloadPolicy()
    half = torch.bfloat16 if config.train.pure_bf16 else None
    reduced = torch.bfloat16 if config.parallel.reduce_dtype == "bfloat16" else full_dtype()
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=reduced, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)

    def shard(module: nn.Module, over: DeviceMesh, precision: MixedPrecisionPolicy) -> None:
        stacked = isinstance(module, Experts)
        fully_shard(
            module,
            mesh=over,
            reshard_after_forward=frees,
            shard_placement_fn=partial(stack_placement, size=over.size(over.ndim - 1)) if stacked else None,
            mp_policy=precision,
            offload_policy=offload,
        )

    for block in model.blocks():
        if block.moe is not None:
            shard(block.moe.router, dense_mesh, exact)  # routers compute in float32 always
            shard(block.moe.experts, expert_mesh, policy)
        shard(block, dense_mesh, policy)
    for stage in model.stages:
        shard(stage, dense_mesh, policy)
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                # One rule for scale: sums everywhere. gloo has no other reduction that FSDP would use.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


def _meshes(mesh: Mesh) -> tuple[DeviceMesh, DeviceMesh]:
    if mesh.hybrid_dense is not None and mesh.hybrid_sparse is not None:
        return mesh.hybrid_dense["dp_replicate", "dp_shard"], mesh.hybrid_sparse["edp_replicate", "edp_shard"]
    assert mesh.dense is not None
    assert mesh.sparse is not None
    return mesh.dense["dp"], mesh.sparse["edp"]


class FSDPEngine(TorchEngine):
    """`Engine` of zero stages 1 to 3: FSDP reduces during backward, each rank holds its shard of everything."""

    def __init__(self, model: Transformer, config: Config, mesh: Mesh) -> None:
        super().__init__(model, mesh)
        if config.train.pure_bf16:
            model.round_frozen(torch.bfloat16)
        shard_parameters(model, config, mesh)
        self.zero_stage = config.parallel.zero_stage
        self.parameters = {name: p for name, p in self.held_parameters().items() if p.requires_grad}
        self.expert_names = model.expert_parameter_names() & self.parameters.keys()
        self.optimizer = LogicalOptimizer(self, config.optimizer)

    def held_parameters(self, every_name: bool = False) -> dict[str, nn.Parameter]:
        """This rank's shards, whatever pass has run."""
        reshard(self.model)
        held = dict(self.model.named_parameters(remove_duplicate=not every_name))
        assert all(isinstance(parameter, DTensor) for parameter in held.values())
        return held

    @property
    def views(self) -> dict[str, Tensor]:
        """This rank's shard of every gradient by name, float32; zeros where the last batch gave none."""
        return {name: local(gradient) for name, gradient in self.gradients().items()}

    def gradients(self) -> dict[str, Tensor]:
        """Gradients as parameters are laid out: DTensors."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return {name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None}

    def zero_grad(self) -> None:
        """The next backward pass makes them anew."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def before_backward(self, is_last: bool) -> None:
        """Called before each micro-batch: stage 1 reduces once, after the last; the others every time. Stages 1 and 2
        keep parameters whole until after the last.

        Not for a pipeline: its schedule always does what stage 1 does.
        """
        assert isinstance(self.model, FSDPModule)
        if self.zero_stage == 1:
            self.model.set_requires_gradient_sync(is_last)
        self.model.set_requires_all_reduce(is_last)
        if self.zero_stage < 3:
            self.model.set_reshard_after_backward(is_last)

    def before_last_backward(self) -> None:
        """Nothing to begin early: the schedule has FSDP reduce each stage after its last micro-batch."""

    def _sum(self) -> None:
        """Nothing left to do: backward has reduced."""

    def norm(self) -> Tensor:
        """L2 norm over every logical parameter once, 0-dim float64, the same number on every rank."""
        gradients = self.views
        dense = self._squared_norm([g for name, g in gradients.items() if name not in self.expert_names])
        experts = self._squared_norm([g for name, g in gradients.items() if name in self.expert_names])
        dense = self.mesh.sum_over("dp_shard", dense)
        experts = self.mesh.sum_over("ep", self.mesh.sum_over("edp_shard", experts))
        return self.mesh.sum_over("pp", dense + experts).sqrt()

    def _squared_norm(self, shards: list[Tensor]) -> Tensor:
        shards = [shard for shard in shards if shard.numel()]
        if not shards:
            return torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        return torch.stack(torch._foreach_norm(shards)).double().square().sum().to(self.mesh.device)

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale all gradients so that their global norm is at most `max_norm`."""
        shards = list(self.views.values())
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).to(full_dtype())
        torch._foreach_mul_(shards, factor.to(shards[0].device))
