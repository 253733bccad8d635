"""Optimizers over logical parameters: decay groups, float32 master weights, per-expert matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_dist.config import OptimizerConfig
from moe_dist.models.precision import full, full_dtype
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.gradients import Gradients
from moe_dist.parallel.sharding import ShardedGradients, local


class Optimizer:
    """A torch optimizer that sees float32 tensors with float32 gradients, whatever the model computes in.

    Where a parameter is float32 it is optimized in place; otherwise a float32 master copy is, and the parameter
    follows it. Adafactor scales an update by norms over whole tensors, which for stacked experts would depend on
    how many experts a rank holds; it therefore sees every expert as a matrix of its own.
    """

    def __init__(self, model: Transformer, gradients: Gradients | ShardedGradients, config: OptimizerConfig) -> None:
        self.config, self.gradients = config, gradients
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        experts = model.expert_parameter_names() if config.optim == "adafactor" else set()
        self.split = {name for name in experts & self.parameters.keys() if self.parameters[name].ndim == 3}
        self.targets: dict[str, list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            master = local(parameter.detach())
            if parameter.dtype != full_dtype():
                master = self.masters[name] = full(master)
            self.targets[name] = self._parts(name, master)
        decayed = {name for name, parameter in self.parameters.items() if parameter.ndim >= 2}
        groups = [
            {"params": self._tensors(decayed), "weight_decay": config.weight_decay},
            {"params": self._tensors(set(self.parameters) - decayed), "weight_decay": 0.0},
        ]
        self.optimizer = torch_optimizer([group for group in groups if group["params"]], config)

    def _parts(self, name: str, tensor: Tensor) -> list[Tensor]:
        return list(tensor.unbind(0)) if name in self.split else [tensor]

    def _tensors(self, names: set[str]) -> list[Tensor]:
        return [target for name, targets in self.targets.items() if name in names for target in targets]

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients as they stand."""
        views = self.gradients.views
        for name, targets in self.targets.items():
            for target, gradient in zip(targets, self._parts(name, views[name]), strict=True):
                target.grad = gradient
        self.optimizer.step()
        self.follow_masters()

    @torch.no_grad()
    def follow_masters(self) -> None:
        """Set parameters that are not float32 to their master copies."""
        for name, master in self.masters.items():
            self.parameters[name].copy_(master)

    @torch.no_grad()
    def create_state(self) -> None:
        """Allocate the state a first step would, without moving anything: loading a checkpoint needs it in place."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.gradients.zero()
        self.set_learning_rate(0.0)
        self.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def named_state(self) -> Iterator[tuple[str, str, list[Tensor], bool]]:
        """(parameter name, state key, tensors, split): one tensor, or with `split` one per local expert."""
        for name, targets in self.targets.items():
            states = [self.optimizer.state[target] for target in targets]
            for key in states[0]:
                yield name, key, [state[key] for state in states], name in self.split
            if name in self.masters:
                yield name, "master", [self.masters[name]], False


def torch_optimizer(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The configured optimizer for these parameter groups."""
    rate = config.learning_rate
    if config.optim in ("adamw_torch_fused", "adamw_torch"):
        return torch.optim.AdamW(
            groups,
            lr=rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=config.optim == "adamw_torch_fused",
            foreach=False if config.optim == "adamw_torch_fused" else None,
        )
    if config.optim == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate)
    return torch.optim.SGD(groups, lr=rate, momentum=config.momentum)
