"""Optimizers over logical parameters: decay groups, master weights in full precision, experts one by one."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.config import OptimizerConfig
from moe_dist.models.shapes import one_expert
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.engines.base import NamedState
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.state_bytes import StateBytes

_NOTE = "RMS"
"""Adafactor's of the weights' size, made anew by every step."""


class TorchEngine(ABC):
    """What engines share whose gradients are in torch's hands and whose weights a torch optimizer moves."""

    optimizer: LogicalOptimizer

    def __init__(self, model: Transformer, mesh: Mesh) -> None:
        """A subclass gets its gradients ready and then makes its `optimizer`."""
        self.model, self.mesh = model, mesh

    @property
    @abstractmethod
    def views(self) -> dict[str, Tensor]:
        """This rank's part of every trained parameter's gradient by name, in full precision, never None."""

    @abstractmethod
    def zero_grad(self) -> None: ...

    @abstractmethod
    def held_parameters(self, every_name: bool = False) -> dict[str, nn.Parameter]: ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, added to those before it."""
        loss.backward()

    def reduce(self) -> None:
        """Gradients are summed; those of single experts that are not trained go, before a norm is taken."""
        self._sum()
        if still := self.optimizer.still:
            views = self.views
            for name, rows in still.items():
                views[name][rows] = 0.0

    @abstractmethod
    def _sum(self) -> None:
        """Sum gradients over replicas."""

    def step(self, rate: float) -> None:
        """One update from the gradients as they stand."""
        self.optimizer.step(rate)

    def named_state(self) -> NamedState:
        """The torch optimizer's, by the parameters it belongs to."""
        return self.optimizer.named_state()

    def state_loaded(self) -> None:
        """Parameters of lower precision follow their masters."""
        self.model.follow_masters()

    def held_bytes(self) -> StateBytes:
        """Bytes of this rank's own parts."""
        state = [value for entry in self.optimizer.optimizer.state.values() for value in entry.values()]
        tensors = [local(one) for one in (*state, *self.model.masters.values()) if isinstance(one, Tensor) and one.ndim]
        return StateBytes(
            weights=sum(local(parameter.detach()).nbytes for parameter in self.model.parameters()),
            gradients=sum(view.nbytes for view in self.views.values()),
            optimizer=sum(tensor.nbytes for tensor in tensors),
        )


class LogicalOptimizer:
    """A torch optimizer that sees tensors and gradients in full precision, whatever the model computes in.

    Where a parameter has a master copy (`Transformer.masters`) that is optimized, and the parameter follows it; any
    other in place. Adafactor scales an update by norms over whole tensors, which for stacked experts would depend on
    how many experts a rank holds; it therefore sees every expert's part as a tensor of its own.
    """

    def __init__(self, engine: TorchEngine, config: OptimizerConfig) -> None:
        self.engine, self.model = engine, engine.model
        model, masters = engine.model, engine.model.masters
        trained = {name: p for name, p in engine.held_parameters().items() if p.requires_grad}
        self.moved = {name: self._rows(name, trained[name]) for name in model.trained_in_part if name in trained}
        """Of parameters that are trained in part: row here -> global id of the expert, of those that are."""
        self.still = {name: self._others(rows, local(trained[name]).shape) for name, rows in self.moved.items()}
        """Rows of the same parameters that are not trained."""
        self.split = set()
        if config.optim == "adafactor":
            self.split = (model.stacked_names() & trained.keys()) - self.moved.keys()
        self.targets: dict[str, list[Tensor]] = {}
        for name, parameter in trained.items():
            self.targets[name] = self._parts(name, masters.get(name, local(parameter.detach())))
        decayed = model.decayed_names()
        groups = [
            {"params": self._tensors(trained.keys() & decayed), "weight_decay": config.weight_decay},
            {"params": self._tensors(trained.keys() - decayed), "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # Of the experts that are trained a rank may have none, and torch has no optimizer of nothing.
        nothing = [{"params": [torch.zeros(0, device=engine.mesh.device)]}]
        self.optimizer = torch_optimizer(groups or nothing, config)
        self._create_state()

    def _rows(self, name: str, parameter: nn.Parameter) -> dict[int, int]:
        if name not in self.model.stacked_names():  # of one expert alone, which is not trained
            return {}
        from moe_dist.parallel.dtensor_layout import like_parameter, local_offset  # DTensors take long to import

        first = local_offset(like_parameter(parameter.detach(), parameter, True, self.engine.mesh))[0]
        trained = self.model.trained_in_part[name]
        return {row: first + row for row in range(len(local(parameter))) if first + row in trained}

    def _others(self, rows: dict[int, int], shape: torch.Size) -> list[int] | EllipsisType:
        return [row for row in range(shape[0]) if row not in rows] if rows else ...

    def _parts(self, name: str, tensor: Tensor) -> list[Tensor]:
        if name in self.moved:
            return [tensor[row] for row in self.moved[name]]
        return list(tensor.unbind(0)) if name in self.split else [tensor]

    def _tensors(self, names: set[str]) -> list[Tensor]:
        return [target for name, targets in self.targets.items() if name in names for target in targets]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update from the gradients as they stand."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._update()
        self.model.follow_masters()

    def _update(self) -> None:
        views = self.engine.views
        for name, targets in self.targets.items():
            for target, gradient in zip(targets, self._parts(name, views[name]), strict=True):
                target.grad = gradient
        self.optimizer.step()

    @torch.no_grad()
    def _create_state(self) -> None:
        """The state of no step yet, where torch has none before the first: what is saved, and read, has the same
        tensors always.
        """
        self.engine.zero_grad()
        with at_rest(self.optimizer):
            self._update()

    def named_state(self) -> NamedState:
        """As `Engine.named_state`."""
        for name, targets in self.targets.items():
            states = [self.optimizer.state[target] for target in targets]
            if name in self.moved:
                for expert, state in zip(self.moved[name].values(), states, strict=True):
                    yield from ((one_expert(name, expert), key, [state[key]], False) for key in state if key != _NOTE)
                continue
            for key in states[0]:
                if key != _NOTE:
                    yield name, key, [state[key] for state in states], name in self.split


def torch_optimizer(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The configured optimizer for these parameter groups."""
    rate = config.learning_rate
    if config.optim in ("adamw_torch_fused", "adamw_torch"):
        return _AdamW(
            groups,
            lr=rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=config.optim == "adamw_torch_fused",
            foreach=False if config.optim == "adamw_torch_fused" else None,
        )
    if config.optim == "adafactor":
        from moe_dist.parallel.engines.adafactor import Adafactor

        return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
    return _SGD(groups, lr=rate, momentum=config.momentum)


class _NotCompiled(torch.optim.Optimizer):
    """A torch optimizer without what torch has around it for programs that compile their updates.

    That loads the compiler, for most of a second, in every process.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        update: Any = super().step
        return inspect.unwrap(update.__func__)(self, closure)


class _AdamW(_NotCompiled, torch.optim.AdamW): ...


class _SGD(_NotCompiled, torch.optim.SGD): ...


@contextmanager
def at_rest(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A step of zero gradients inside moves nothing and counts for nothing: it allocates the state."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    yield
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif key == "step":  # Adafactor counts in a number, which cannot be read into
                state[key] = torch.zeros(())


def reshard(model: Transformer) -> None:
    """Let go of what a forward pass has gathered: parameters are this rank's shards again. No communication.

    After a backward pass FSDP does so itself. Without one, stages 1 and 2 stay whole, and `named_parameters()` and
    `state_dict()` would give whole tensors that no update moves.
    """
    for stage in model.stages:
        for module in stage.modules():
            # By what it can do: FSDP takes most of a second to import.
            if (let_go := getattr(type(module), "reshard", None)) is not None:
                let_go(module)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: a DTensor's local shard, anything else itself. Shares memory."""
    # By what it can do: a process without DTensors need not import them, which takes half a second.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
