"""Optimizers over logical parameters: decay groups, master weights in full precision, experts one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_dist.config import OptimizerConfig
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.engines.fsdp import ShardedGradients, held_parameters, local
from moe_dist.parallel.engines.replicated import Gradients
from moe_dist.parallel.optimizer_state import at_rest


class Optimizer:
    """A torch optimizer that sees tensors and gradients in full precision, whatever the model computes in.

    Where a parameter has a master copy (`Transformer.masters`) that is optimized, and the parameter follows it; any
    other in place. Adafactor scales an update by norms over whole tensors, which for stacked experts would depend on
    how many experts a rank holds; it therefore sees every expert's part as a tensor of its own.
    """

    def __init__(self, model: Transformer, gradients: Gradients | ShardedGradients, config: OptimizerConfig) -> None:
        self.model, self.gradients, self.masters = model, gradients, model.masters
        trained = {name: p for name, p in held_parameters(model).items() if p.requires_grad}
        self.split = model.stacked_names() & trained.keys() if config.optim == "adafactor" else set()
        self.targets: dict[str, list[Tensor]] = {}
        for name, parameter in trained.items():
            self.targets[name] = self._parts(name, self.masters.get(name, local(parameter.detach())))
        decayed = model.decayed_names()
        groups = [
            {"params": self._tensors(trained.keys() & decayed), "weight_decay": config.weight_decay},
            {"params": self._tensors(trained.keys() - decayed), "weight_decay": 0.0},
        ]
        self.optimizer = torch_optimizer([group for group in groups if group["params"]], config)
        self._create_state()

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
        self._update()
        self.follow_masters()

    def _update(self) -> None:
        views = self.gradients.views
        for name, targets in self.targets.items():
            for target, gradient in zip(targets, self._parts(name, views[name]), strict=True):
                target.grad = gradient
        self.optimizer.step()

    def follow_masters(self) -> None:
        """Set parameters of lower precision to their masters; after a checkpoint was read, too."""
        self.model.follow_masters()

    @torch.no_grad()
    def _create_state(self) -> None:
        """The state of no step yet, where torch has none before the first: what is saved, and read, has the same
        tensors always.
        """
        self.gradients.zero()
        with at_rest(self.optimizer):
            self._update()

    def named_state(self) -> Iterator[tuple[str, str, list[Tensor], bool]]:
        """(parameter name, state key, tensors, split): one tensor, or with `split` one per local expert."""
        for name, targets in self.targets.items():
            states = [self.optimizer.state[target] for target in targets]
            for key in states[0]:
                if key != "RMS":  # Adafactor's note of the weights' size, made anew by every step
                    yield name, key, [state[key] for state in states], name in self.split


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
        # The one that `TrainingArguments` means by this name; torch's scales the rate by the size of the weights.
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
    return torch.optim.SGD(groups, lr=rate, momentum=config.momentum)
