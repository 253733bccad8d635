"""Bugs of pipelines: schedules, what stages sum over each other, and what is seeded or counted by stage."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.models import initial_weights, moe
from moe_dist.parallel.engines.replicated import ReplicatedEngine
from moe_dist.parallel.mesh import Mesh
from moe_dist.verify.injected_bugs.planting import Replace, after_reduce


def gradients_scaled_by_the_schedule(replace: Replace) -> None:
    """What a schedule does unless it is told not to: gradients divided by the number of micro-batches."""
    from moe_dist.parallel.pipeline import PipelinedTransformer

    make = PipelinedTransformer._schedule

    def wrong(self: PipelinedTransformer, *arguments: Any) -> Any:
        schedule = make(self, *arguments)
        schedule.scale_grads = True
        return schedule

    replace(PipelinedTransformer, "_schedule", wrong)


def auxiliary_loss_scaled_by_the_schedule(replace: Replace) -> None:
    """The injected loss divided by the number of micro-batches, the main loss not."""
    from moe_dist.parallel.pipeline import PipelinedTransformer

    run, inject = PipelinedTransformer.run, moe.inject_loss

    def wrong(self: PipelinedTransformer, micro_batches: list, *others: Any) -> list[Tensor]:
        with patch.object(moe, "inject_loss", lambda x, loss: inject(x, loss / len(micro_batches))):
            return run(self, micro_batches, *others)

    replace(PipelinedTransformer, "run", wrong)


def gradients_of_a_stage_sent_early(replace: Replace) -> None:
    """In the backward pass of its first micro-batch; those of later ones stay where they are."""
    from moe_dist.parallel.pipeline import WatchedStage

    backward = WatchedStage.backward_one_chunk

    def wrong(self: WatchedStage, *arguments: Any, **options: Any) -> None:
        if self.before_last_backward is not None:
            self.before_last_backward()
        backward(self, *arguments, **options)

    replace(WatchedStage, "backward_one_chunk", wrong)


def gradients_of_a_stage_reduced_twice(replace: Replace) -> None:
    def again(gradients: ReplicatedEngine) -> None:
        if gradients.mesh.layout.pp_size > 1 and gradients.mesh.pp_rank == 0:
            gradients.dense.send_rest()
            gradients.dense.wait()

    after_reduce(replace, again)


def norm_of_the_last_stage(replace: Replace) -> None:
    add = Mesh.sum_over

    def wrong(self: Mesh, axis: str, tensor: Tensor) -> Tensor:
        others = axis == "pp" and self.pp_rank < self.layout.pp_size - 1
        return add(self, axis, torch.zeros_like(tensor) if others else tensor)

    replace(Mesh, "sum_over", wrong)


def loss_of_one_stage(replace: Replace) -> None:
    """The total of a step, a single number, is summed over replicas alone: other stages have none."""
    add = Mesh.sum_over

    def wrong(self: Mesh, axis: str, tensor: Tensor) -> Tensor:
        return add(self, "dp" if axis == "world" and tensor.shape == (1,) else axis, tensor)

    replace(Mesh, "sum_over", wrong)


def seeds_by_local_layer(replace: Replace) -> None:
    seed = initial_weights.seed_of

    def wrong(number: int, name: str, expert: int | None = None) -> int:
        parts = name.split(".")
        if parts[0] == "layers" and dist.is_initialized():
            parts[1] = str(int(parts[1]) % 3)
        return seed(number, ".".join(parts), expert)

    replace(initial_weights, "seed_of", wrong)


def load_counted_by_a_pass_for_shapes(replace: Replace) -> None:
    """Stages that are not told their shapes run a forward pass to find them, and routers count its tokens."""
    from moe_dist.parallel import pipeline

    make = pipeline.WatchedStage

    def wrong(*arguments: Any, input_args: Any, output_args: Any, **options: Any) -> Any:
        return make(*arguments, **options)

    replace(pipeline, "WatchedStage", wrong)
