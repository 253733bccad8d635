"""Replicated parameters: every replica holds all, gradients are summed over replicas and clipped by one norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe_dist.config import Config
from moe_dist.models.precision import full_dtype
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.engines.optimizer import LogicalOptimizer, TorchEngine
from moe_dist.parallel.mesh import Mesh


class GradientBuffer:
    """Float32 gradients of some parameters, side by side in one flat tensor.

    A float32 parameter's `.grad` is a view into it, so it is zero and never None, whatever part of the model a
    batch used; that keeps optimizer state moving and collectives matched on every rank. Gradients of bfloat16
    parameters are added to their view as soon as they are complete, so accumulation keeps float32 precision.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], device: torch.device) -> None:
        self.parameters = dict(named_parameters)
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.flat = torch.zeros(sum(sizes), dtype=full_dtype(), device=device)
        views = zip(self.parameters.items(), self.flat.split(sizes), strict=True)
        self.views = {name: view.view(parameter.shape) for (name, parameter), view in views}
        for name, parameter in self.parameters.items():
            if parameter.dtype == full_dtype():
                parameter.grad = self.views[name]
            else:
                parameter.register_post_accumulate_grad_hook(_move_gradient_to(self.views[name]))

    def zero(self) -> None:
        """Start the next optimizer step."""
        self.flat.zero_()

    def all_reduce(self, group: ProcessGroup | None, bucket_bytes: int) -> None:
        """SUM over the ranks that hold the same parameters, in buckets that travel at the same time."""
        if group is None:
            return
        buckets = self.flat.split(max(1, bucket_bytes // self.flat.element_size()))
        for work in [dist.all_reduce(bucket, group=group, async_op=True) for bucket in buckets]:
            work.wait()

    def squared_norm(self) -> Tensor:
        """Sum of squares, 0-dim float64."""
        if not self.views:
            return torch.zeros((), dtype=torch.float64, device=self.flat.device)
        norms = torch._foreach_norm(list(self.views.values()))
        return torch.stack(norms).double().square().sum()


class ReplicatedEngine(TorchEngine):
    """`Engine` of zero stage 0, and of a single process.

    Dense parameters are replicated over `dp`, experts over `edp`. Experts have already seen the tokens of all their
    `ep` peers, so each sum is over the remaining copies only, and no parameter has a scale factor of its own: the
    loss is divided by the tokens of the global batch, every reduction is a SUM.
    """

    def __init__(self, model: Transformer, config: Config, mesh: Mesh, bucket_mb: float = 32.0) -> None:
        super().__init__(model, mesh)
        if config.train.pure_bf16:
            model.round_weights(torch.bfloat16)
        expert_names = model.expert_parameter_names()
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.bucket_bytes = int(bucket_mb * 2**20)
        self.dense = GradientBuffer([item for item in trained if item[0] not in expert_names], mesh.device)
        self.experts = GradientBuffer([item for item in trained if item[0] in expert_names], mesh.device)
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
        """Called before each micro-batch: nothing to prepare, `reduce` comes after the last."""

    def zero_grad(self) -> None:
        """Every gradient stays where it is, and is zero."""
        self.dense.zero()
        self.experts.zero()

    def reduce(self) -> None:
        """Sum over replicas. Call once per optimizer step, after the last micro-batch."""
        self.dense.all_reduce(self.mesh.group("dp"), self.bucket_bytes)
        self.experts.all_reduce(self.mesh.group("edp"), self.bucket_bytes)

    def norm(self) -> Tensor:
        """L2 norm over every logical parameter once, 0-dim float64, the same number on every rank."""
        experts = self.mesh.sum_over("ep", self.experts.squared_norm())
        return self.mesh.sum_over("pp", self.dense.squared_norm() + experts).sqrt()

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale all gradients so that their global norm is at most `max_norm`."""
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).to(full_dtype())
        self.dense.flat.mul_(factor)
        self.experts.flat.mul_(factor)


def _move_gradient_to(view: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        if parameter.grad is not None:
            view.add_(parameter.grad)
            parameter.grad = None

    return move
