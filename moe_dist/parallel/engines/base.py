"""What a training step and a checkpoint know of an engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from moe_dist.parallel.state_bytes import StateBytes

NamedState = Iterator[tuple[str, str, list[Tensor], bool]]
"""(parameter name, state key, tensors, split): one tensor, or with `split` one for each of this rank's experts. Where
single experts of a stack are trained each has state under a name of its own (`shapes.one_expert`)."""


class Engine(Protocol):
    """How parameters, gradients and optimizer state lie on ranks, and what moves them.

    An optimizer step is `zero_grad`, for every micro-batch `before_backward`, a forward pass and `backward`, then once
    `reduce`, `norm`, `clip` and `step`; a step that is skipped ends after `norm`. Every method is called by all ranks
    in the same order. Losses are already divided by the tokens of the global batch, so an engine only ever sums:
    dense parameters over `dp`, experts over `edp`.
    """

    def zero_grad(self) -> None:
        """Forget all gradients, also those of a step that was skipped."""

    def before_backward(self, is_last: bool) -> None:
        """Before the forward pass of each micro-batch; `is_last`: of this step. Not called by a pipeline."""

    def before_last_backward(self) -> None:
        """By a pipeline instead: no other backward pass of this rank comes after the next one in this step. Called only
        where the schedule has such a moment."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch, 0-dim `loss`, to those before it. Not called by a pipeline."""

    def reduce(self) -> None:
        """After the last micro-batch: gradients are summed over replicas when this returns."""

    def norm(self) -> Tensor:
        """L2 norm over every logical parameter once, 0-dim float64, the same number on every rank."""

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale all gradients so that their global norm, which is `norm`, is at most `max_norm`."""

    def step(self, rate: float) -> None:
        """One update of the weights at this learning rate."""

    def held_parameters(self, every_name: bool = False) -> dict[str, nn.Parameter]:
        """Parameters by logical name as this rank holds them between steps: shards are `DTensor`s.

        `every_name`: a tied weight under each of its names, not the first alone.
        """

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by name, laid out as `held_parameters` or whole; for looking at, not for training (collective)."""

    def named_state(self) -> NamedState:
        """The optimizer's state, to be saved, or to be read into; the same keys before the first step (collective)."""

    def state_loaded(self) -> None:
        """A checkpoint was read into weights, masters and `named_state`: take over what lies elsewhere (collective)."""

    def held_bytes(self) -> StateBytes | None:
        """Bytes of this rank's tensors between steps; None where that cannot be seen."""
