"""Replicated parameters: every replica holds all, gradients are summed over replicas and clipped by one norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dist.config import Config
from moe_dist.models.precision import full_dtype
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.engines.gradient_buffer import GradientBuffer
from moe_dist.parallel.engines.optimizer import LogicalOptimizer, TorchEngine
from moe_dist.parallel.flight import Trace
from moe_dist.parallel.mesh import Mesh


class ReplicatedEngine(TorchEngine):
    """`Engine` of zero stage 0, and of a single process.

    Dense parameters are replicated over `dp`, experts over `edp`. Experts have already seen the tokens of all their
    `ep` peers, so each sum is over the remaining copies only, and no parameter has a scale factor of its own: the
    loss is divided by the tokens of the global batch, every reduction is a SUM.
    """

    def __init__(self, model: Transformer, config: Config, mesh: Mesh) -> None:
        super().__init__(model, mesh)
        if config.train.pure_bf16:
            model.round_weights(torch.bfloat16)
        expert_names = model.expert_parameter_names()
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        bucket_bytes = int(config.parallel.bucket_cap_mb * 2**20)
        reduce_dtype = torch.bfloat16 if config.parallel.reduce_dtype == "bfloat16" else None
        self.overlaps = config.parallel.overlap_grad_reduce
        dense = [item for item in trained if item[0] not in expert_names]
        experts = [item for item in trained if item[0] in expert_names]
        travels = config.parallel.embedding_grad_reduce
        by_rows = {} if travels == "whole" else {"embed_tokens.weight": travels == "rows"}
        self.dense = GradientBuffer(dense, mesh.device, mesh.group("dp"), bucket_bytes, reduce_dtype, by_rows)
        self.experts = GradientBuffer(experts, mesh.device, mesh.group("edp"), bucket_bytes, reduce_dtype)
        self.optimizer = LogicalOptimizer(self, config.optimizer)

    @property
    def views(self) -> dict[str, Tensor]:
        """Gradient of every trained parameter by name, float32."""
        return self.dense.views | self.experts.views

    def held_parameters(self, every_name: bool = False) -> dict[str, nn.Parameter]:
        """All of this rank's part of the model."""
        return dict(self.model.named_parameters(remove_duplicate=not every_name))

    def gradients(self) -> dict[str, Tensor]:
        """The same as `views`."""
        return self.views

    def before_backward(self, is_last: bool) -> None:
        """Called before each micro-batch: during backward of the last, gradients travel as soon as they are complete.

        Not for a pipeline, whose backward passes take turns with forward ones.
        """
        if is_last:
            self.before_last_backward()

    def before_last_backward(self) -> None:
        """No other backward pass of this step comes after the next one."""
        if self.overlaps:
            self.dense.reduce_early()
            self.experts.reduce_early()

    def look(self, trace: Trace | None) -> None:
        """Sums of gradients are part of what `trace` sees; None: of nothing."""
        self.dense.trace = self.experts.trace = trace

    def zero_grad(self) -> None:
        """Every gradient stays where it is, and is zero."""
        self.dense.zero()
        self.experts.zero()

    def _sum(self) -> None:
        self.dense.send_rest()
        self.experts.send_rest()
        self.dense.wait()
        self.experts.wait()

    def norm(self) -> Tensor:
        """L2 norm over every logical parameter once, 0-dim float64, the same number on every rank."""
        experts = self.mesh.sum_over("ep", self.experts.squared_norm())
        return self.mesh.sum_over("pp", self.dense.squared_norm() + experts).sqrt()

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale all gradients so that their global norm is at most `max_norm`."""
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).to(full_dtype())
        self.dense.flat.mul_(factor)
        self.experts.flat.mul_(factor)
