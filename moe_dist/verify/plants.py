"""Known bugs of parallel trainers, planted on purpose: proof that the proof can fail."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moe_dist.models import auxiliary, moe, transformer
from moe_dist.models.auxiliary import LoadBalance
from moe_dist.models.experts import ExpertList, Experts
from moe_dist.models.router import Router
from moe_dist.parallel import deepspeed
from moe_dist.parallel.deepspeed import DeepSpeedEngine
from moe_dist.parallel.gradients import GradientBuffer, Gradients
from moe_dist.parallel.mesh import Mesh
from moe_dist.train import step
from moe_dist.train.balance import Balancer
from moe_dist.train.optimizer import Optimizer
from moe_dist.train.step import TrainStep
from moe_dist.verify.layouts import BUGS


def _after_reduce(change: Callable[[Gradients], object]) -> Any:
    reduce = Gradients.reduce

    def wrong(self: Gradients) -> None:
        reduce(self)
        change(self)

    return patch.object(Gradients, "reduce", wrong)


def _expert_gradient_times_ep() -> Any:
    return _after_reduce(lambda gradients: gradients.experts.flat.mul_(gradients.mesh.layout.ep_size))


def _expert_gradient_averaged_over_edp() -> Any:
    return _after_reduce(lambda gradients: gradients.experts.flat.div_(gradients.mesh.layout.edp_size))


def _expert_gradient_averaged_over_active_replicas() -> Any:
    reduce = GradientBuffer.all_reduce

    def wrong(self: GradientBuffer, group: Any, bucket_bytes: int) -> None:
        if group is None or not any(".experts." in name for name in self.views):
            return reduce(self, group, bucket_bytes)
        for view in self.views.values():
            active = (view.flatten(1).abs().sum(1) > 0).float()
            dist.all_reduce(active, group=group)
            dist.all_reduce(view, group=group)
            # Right when every replica used the expert, wrong when only some did.
            view.mul_((group.size() / active.clamp(min=1)).view(-1, *[1] * (view.ndim - 1)))
        return None

    return patch.object(GradientBuffer, "all_reduce", wrong)


def _loss_by_local_tokens() -> Any:
    count = TrainStep._count_tokens

    def wrong(self: TrainStep, batches: list) -> Tensor:
        counts = count(self, batches)
        counts[0] = sum(batch.num_valid for batch in batches) * self.mesh.layout.dp_size
        return counts

    return patch.object(TrainStep, "_count_tokens", wrong)


def _auxiliary_loss_by_local_tokens() -> Any:
    count = TrainStep._count_tokens

    def wrong(self: TrainStep, batches: list) -> Tensor:
        counts = count(self, batches)
        counts[1] = sum(batch.num_tokens for batch in batches)
        return counts

    return patch.object(TrainStep, "_count_tokens", wrong)


def _auxiliary_loss_times_micro_batches() -> Any:
    accumulate = TrainStep.accumulate

    def wrong(self: TrainStep, batches: list, counts: Tensor, step: int) -> Tensor:
        scaled = counts.clone().float()
        scaled[1] /= len(batches) * self.mesh.layout.dp_size
        return accumulate(self, batches, scaled, step)

    return patch.object(TrainStep, "accumulate", wrong)


def _norm_without_experts() -> Any:
    return patch.object(Gradients, "norm", lambda self: self.dense.squared_norm().sqrt())


def _norm_counts_replicas() -> Any:
    def wrong(self: Gradients) -> Tensor:
        return (self.dense.squared_norm() + self.mesh.sum_over("dp", self.experts.squared_norm())).sqrt()

    return patch.object(Gradients, "norm", wrong)


def _norm_of_own_experts() -> Any:
    """Those of other ranks of the `ep` group left out, whatever shards: each rank has a norm of its own."""
    add = Mesh.sum_over
    return patch.object(Mesh, "sum_over", lambda self, axis, x: x if axis == "ep" else add(self, axis, x))


def _replica_misses_the_last_update() -> Any:
    """The last rank's weights stay behind: no loss or norm tells of it any more, and no copy but its own."""
    update, count = Optimizer.step, itertools.count(1)

    def wrong(self: Optimizer) -> None:
        if next(count) < 3 or not dist.is_initialized() or dist.get_rank() < dist.get_world_size() - 1:
            update(self)

    return patch.object(Optimizer, "step", wrong)


def _fsdp_averages() -> Any:
    """FSDP as it comes: gradients divided by the number of ranks that share a parameter."""
    return patch.object(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)


def _fsdp_averages_experts() -> Any:
    """The rest is summed, experts are averaged over the ranks that hold them."""
    divide = FSDPModule.set_gradient_divide_factor

    def wrong(self: FSDPModule, factor: float) -> None:
        if not isinstance(self, (Experts, ExpertList)):
            divide(self, factor)

    return patch.object(FSDPModule, "set_gradient_divide_factor", wrong)


def _router_cut_from_loss() -> Any:
    forward = Router.forward

    def wrong(self: Router, x_TD: Tensor) -> Any:
        routing = forward(self, x_TD)
        return moe.replace(routing, weights_TK=routing.weights_TK.detach())

    return patch.object(Router, "forward", wrong)


def _auxiliary_loss_cut() -> Any:
    return patch.object(moe, "inject_loss", lambda x, loss: x)


def _auxiliary_loss_cut_with_capacity() -> Any:
    route = moe.MoE._route

    def wrong(self: moe.MoE, *arguments: Any, **options: Any) -> Any:
        routing, loss = route(self, *arguments, **options)
        return routing, loss if self.capacity_factor is None else None

    return patch.object(moe.MoE, "_route", wrong)


def _global_load_is_local() -> Any:
    def wrong(self: LoadBalance, load: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return load, tokens

    return patch.object(LoadBalance, "_reduced", wrong)


def _load_of_the_whole_batch_unknown() -> Any:
    return patch.object(TrainStep, "_needs_load_first", lambda self, batches: False)


def _bias_from_counts_after_drop() -> Any:
    count = auxiliary.count_load

    def wrong(ids: Tensor, num_experts: int, num_groups: int) -> Tensor:
        capacity = torch.tensor(ids.shape[0] * ids.shape[1] // num_experts)
        return count(moe.drop_over_capacity(ids, num_experts, capacity), num_experts, num_groups)

    return patch.object(auxiliary, "count_load", wrong)


def _bias_from_local_counts() -> Any:
    def wrong(self: Balancer) -> Tensor:
        return torch.stack([facts.pairs_E for facts in self.facts.values()])

    return patch.object(Balancer, "global_pairs", wrong)


def _seeds_by_local_expert() -> Any:
    seed = transformer._seed

    def wrong(number: int, name: str, expert: int | None = None) -> int:
        if expert is None or not dist.is_initialized():
            return seed(number, name, expert)
        return seed(number, name, expert % 2)

    return patch.object(transformer, "_seed", wrong)


def _capacity_of_the_whole_group() -> Any:
    capacity = moe.MoE._capacity

    def wrong(self: moe.MoE, ids: Tensor, valid: Tensor | None) -> Tensor:
        group = getattr(self.dispatcher, "ep_size", 1)
        return capacity(self, ids, valid) * group

    return patch.object(moe.MoE, "_capacity", wrong)


def _gradients_scaled_by_the_schedule() -> Any:
    """What a schedule does unless it is told not to: gradients divided by the number of micro-batches."""
    from moe_dist.parallel.pipeline import PipelinedTransformer

    make = PipelinedTransformer._schedule

    def wrong(self: PipelinedTransformer, *arguments: Any) -> Any:
        schedule = make(self, *arguments)
        schedule.scale_grads = True
        return schedule

    return patch.object(PipelinedTransformer, "_schedule", wrong)


def _auxiliary_loss_scaled_by_the_schedule() -> Any:
    """The injected loss divided by the number of micro-batches, the main loss not."""
    from moe_dist.parallel.pipeline import PipelinedTransformer

    run, inject = PipelinedTransformer.run, moe.inject_loss

    def wrong(self: PipelinedTransformer, micro_batches: list, loss_of: Any) -> list[Tensor]:
        with patch.object(moe, "inject_loss", lambda x, loss: inject(x, loss / len(micro_batches))):
            return run(self, micro_batches, loss_of)

    return patch.object(PipelinedTransformer, "run", wrong)


def _gradients_of_a_stage_reduced_twice() -> Any:
    def again(gradients: Gradients) -> None:
        if gradients.mesh.layout.pp_size > 1 and gradients.mesh.pp_rank == 0:
            gradients.dense.all_reduce(gradients.mesh.group("dp"), gradients.bucket_bytes)

    return _after_reduce(again)


def _norm_of_the_last_stage() -> Any:
    add = Mesh.sum_over

    def wrong(self: Mesh, axis: str, tensor: Tensor) -> Tensor:
        others = axis == "pp" and self.pp_rank < self.layout.pp_size - 1
        return add(self, axis, torch.zeros_like(tensor) if others else tensor)

    return patch.object(Mesh, "sum_over", wrong)


def _loss_of_one_stage() -> Any:
    add = Mesh.sum_over
    return patch.object(Mesh, "sum_over", lambda self, axis, x: add(self, "dp" if axis == "world" else axis, x))


def _seeds_by_local_layer() -> Any:
    seed = transformer._seed

    def wrong(number: int, name: str, expert: int | None = None) -> int:
        parts = name.split(".")
        if parts[0] == "layers" and dist.is_initialized():
            parts[1] = str(int(parts[1]) % 3)
        return seed(number, ".".join(parts), expert)

    return patch.object(transformer, "_seed", wrong)


def _noise_by_rank() -> Any:
    seed = step.noise_seed
    return patch.object(step, "noise_seed", lambda *key: seed(*key) + dist.get_rank())


def _load_counted_by_a_pass_for_shapes() -> Any:
    """Stages that are not told their shapes run a forward pass to find them, and routers count its tokens."""
    from moe_dist.parallel import pipeline

    make = pipeline.PipelineStage

    def wrong(*arguments: Any, input_args: Any, output_args: Any, **options: Any) -> Any:
        return make(*arguments, **options)

    return patch.object(pipeline, "PipelineStage", wrong)


def _deepspeed_averages() -> Any:
    """DeepSpeed as it comes: gradients divided by the number of replicas."""
    settings = deepspeed.deepspeed_settings

    return patch.object(deepspeed, "deepspeed_settings", lambda c: settings(c) | {"gradient_allreduce_op": "mean"})


def _deepspeed_averages_experts() -> Any:
    """The rest is summed, experts are averaged over the ranks that hold them."""
    reduce = DeepSpeedEngine.reduce

    def wrong(self: DeepSpeedEngine) -> None:
        reduce(self)
        for index, is_expert in enumerate(self.zero_optimizer.is_moe_param_group):
            if is_expert:
                torch._foreach_div_(list(self.zero_optimizer.averaged_gradients[index]), self.mesh.layout.edp_size)

    return patch.object(DeepSpeedEngine, "reduce", wrong)


def _deepspeed_knows_no_experts() -> Any:
    """Parameters of different experts reduced over all replicas, as if they were copies of one."""
    register = DeepSpeedEngine._register_groups

    def wrong(self: DeepSpeedEngine) -> None:
        register(self)
        self.expert_names = set()

    return patch.object(DeepSpeedEngine, "_register_groups", wrong)


def _deepspeed_divides_by_accumulation() -> Any:
    """DeepSpeed divides a loss by its gradient_accumulation_steps; ours is divided by tokens already."""

    def wrong(self: DeepSpeedEngine, loss: Tensor) -> None:
        self.engine._config.gradient_accumulation_steps = 2
        self.engine.backward(self.engine(loss))

    return patch.object(DeepSpeedEngine, "backward", wrong)


PLANTS: dict[str, Callable[[], Any]] = {name: globals()[f"_{name}"] for name in BUGS}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug `name` is in the system inside the block."""
    with PLANTS[name]():
        yield
