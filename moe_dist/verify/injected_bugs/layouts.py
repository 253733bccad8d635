"""Bugs in what ranks do together, whatever is trained: reductions, norms, losses, seeds, schedules."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moe_dist.models import auxiliary, initial_weights, moe
from moe_dist.models.auxiliary import LoadBalance
from moe_dist.models.experts import ExpertList, Experts
from moe_dist.models.router import Router
from moe_dist.parallel.engines import deepspeed
from moe_dist.parallel.engines.deepspeed import DeepSpeedEngine
from moe_dist.parallel.engines.gradient_buffer import GradientBuffer
from moe_dist.parallel.engines.optimizer import LogicalOptimizer
from moe_dist.parallel.engines.replicated import ReplicatedEngine
from moe_dist.parallel.mesh import Mesh
from moe_dist.train import step
from moe_dist.train.balance import Balancer
from moe_dist.train.step import TrainStep
from moe_dist.verify.injected_bugs.planting import Replace
from moe_dist.verify.scenarios import NUM_STEPS


def _after_reduce(replace: Replace, change: Callable[[ReplicatedEngine], object]) -> None:
    reduce = ReplicatedEngine.reduce

    def wrong(self: ReplicatedEngine) -> None:
        reduce(self)
        change(self)

    replace(ReplicatedEngine, "reduce", wrong)


def expert_gradient_times_ep(replace: Replace) -> None:
    _after_reduce(replace, lambda gradients: gradients.experts.flat.mul_(gradients.mesh.layout.ep_size))


def expert_gradient_averaged_over_edp(replace: Replace) -> None:
    _after_reduce(replace, lambda gradients: gradients.experts.flat.div_(gradients.mesh.layout.edp_size))


def expert_gradient_averaged_over_active_replicas(replace: Replace) -> None:
    send_rest, reduce_early = GradientBuffer.send_rest, GradientBuffer.reduce_early

    def early(self: GradientBuffer) -> None:
        if not any(".experts." in name for name in self.views):
            reduce_early(self)

    def wrong(self: GradientBuffer) -> None:
        group = self.group
        if group is None or not any(".experts." in name for name in self.views):
            return send_rest(self)
        for view in self.views.values():
            active = (view.flatten(1).abs().sum(1) > 0).float()
            dist.all_reduce(active, group=group)
            dist.all_reduce(view, group=group)
            # Right when every replica used the expert, wrong when only some did.
            view.mul_((group.size() / active.clamp(min=1)).view(-1, *[1] * (view.ndim - 1)))
        return None

    replace(GradientBuffer, "reduce_early", early)
    replace(GradientBuffer, "send_rest", wrong)


def gradients_sent_before_the_last_micro_batch(replace: Replace) -> None:
    """Every micro-batch sends its gradients as they come; those of later ones stay where they are."""
    before = ReplicatedEngine.before_backward
    replace(ReplicatedEngine, "before_backward", lambda self, is_last: before(self, is_last=True))


def buckets_sent_without_their_last_gradient(replace: Replace) -> None:
    """The gradient of a bucket that comes last is counted as there from the start."""
    begin, arrived = GradientBuffer.reduce_early, GradientBuffer._arrived

    def early(self: GradientBuffer) -> None:
        begin(self)
        for names, missing in zip(self.members, self._missing, strict=False):
            if len(names) > 1:
                missing.remove(names[-1])

    def wrong(self: GradientBuffer, name: str, bucket: int) -> None:
        if name in self._missing[bucket]:
            arrived(self, name, bucket)
            for flight, _ in self._flights:
                flight.land()

    replace(GradientBuffer, "reduce_early", early)
    replace(GradientBuffer, "_arrived", wrong)


def loss_by_local_tokens(replace: Replace) -> None:
    count = TrainStep._count_tokens

    def wrong(self: TrainStep, batches: list) -> Tensor:
        counts = count(self, batches)
        counts[0] = sum(batch.num_valid for batch in batches) * self.mesh.layout.dp_size
        return counts

    replace(TrainStep, "_count_tokens", wrong)


def auxiliary_loss_by_local_tokens(replace: Replace) -> None:
    count = TrainStep._count_tokens

    def wrong(self: TrainStep, batches: list) -> Tensor:
        counts = count(self, batches)
        counts[1] = sum(batch.num_tokens for batch in batches)
        return counts

    replace(TrainStep, "_count_tokens", wrong)


def auxiliary_loss_times_micro_batches(replace: Replace) -> None:
    accumulate = TrainStep.accumulate

    def wrong(self: TrainStep, batches: list, counts: Tensor, step: int) -> Tensor:
        scaled = counts.clone().float()
        scaled[1] /= len(batches) * self.mesh.layout.dp_size
        return accumulate(self, batches, scaled, step)

    replace(TrainStep, "accumulate", wrong)


def norm_without_experts(replace: Replace) -> None:
    replace(ReplicatedEngine, "norm", lambda self: self.dense.squared_norm().sqrt())


def norm_counts_replicas(replace: Replace) -> None:
    def wrong(self: ReplicatedEngine) -> Tensor:
        return (self.dense.squared_norm() + self.mesh.sum_over("dp", self.experts.squared_norm())).sqrt()

    replace(ReplicatedEngine, "norm", wrong)


def norm_of_own_experts(replace: Replace) -> None:
    """Those of other ranks of the `ep` group left out, whatever shards: each rank has a norm of its own."""
    add = Mesh.sum_over
    replace(Mesh, "sum_over", lambda self, axis, x: x if axis == "ep" else add(self, axis, x))


def replica_misses_the_last_update(replace: Replace) -> None:
    """The last rank's weights stay behind: no loss or norm tells of it any more, and no copy but its own."""
    update, count = LogicalOptimizer.step, itertools.count(1)

    def wrong(self: LogicalOptimizer, rate: float) -> None:
        if next(count) < NUM_STEPS or not dist.is_initialized() or dist.get_rank() < dist.get_world_size() - 1:
            update(self, rate)

    replace(LogicalOptimizer, "step", wrong)


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


def router_cut_from_loss(replace: Replace) -> None:
    forward = Router.forward

    def wrong(self: Router, x_TD: Tensor) -> Any:
        routing = forward(self, x_TD)
        return moe.replace(routing, weights_TK=routing.weights_TK.detach())

    replace(Router, "forward", wrong)


def auxiliary_loss_cut(replace: Replace) -> None:
    replace(moe, "inject_loss", lambda x, loss: x)


def auxiliary_loss_cut_with_capacity(replace: Replace) -> None:
    route = moe.MoE._route

    def wrong(self: moe.MoE, *arguments: Any, **options: Any) -> Any:
        routing, loss = route(self, *arguments, **options)
        return routing, loss if self.capacity_factor is None else None

    replace(moe.MoE, "_route", wrong)


def global_load_is_local(replace: Replace) -> None:
    def wrong(self: LoadBalance, load: Tensor, tokens: Tensor, reduce_load: Any) -> tuple[Tensor, Tensor]:
        return load, tokens

    replace(LoadBalance, "_reduced", wrong)


def load_of_the_whole_batch_unknown(replace: Replace) -> None:
    replace(TrainStep, "_needs_load_first", lambda self, batches: False)


def bias_from_counts_after_drop(replace: Replace) -> None:
    count = auxiliary.count_load

    def wrong(ids: Tensor, num_experts: int, num_groups: int) -> Tensor:
        capacity = torch.tensor(ids.shape[0] * ids.shape[1] // num_experts)
        return count(moe.drop_over_capacity(ids, num_experts, capacity), num_experts, num_groups)

    replace(auxiliary, "count_load", wrong)


def bias_from_local_counts(replace: Replace) -> None:
    def wrong(self: Balancer) -> Tensor:
        return torch.stack([facts.pairs_E for facts in self.facts.values()])

    replace(Balancer, "global_pairs", wrong)


def seeds_by_local_expert(replace: Replace) -> None:
    seed = initial_weights.seed_of

    def wrong(number: int, name: str, expert: int | None = None) -> int:
        if expert is None or not dist.is_initialized():
            return seed(number, name, expert)
        return seed(number, name, expert % 2)

    replace(initial_weights, "seed_of", wrong)


def capacity_of_the_whole_group(replace: Replace) -> None:
    capacity = moe.MoE._capacity

    def wrong(self: moe.MoE, ids: Tensor, valid: Tensor | None) -> Tensor:
        group = getattr(self.dispatcher, "ep_size", 1)
        return capacity(self, ids, valid) * group

    replace(moe.MoE, "_capacity", wrong)


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

    _after_reduce(replace, again)


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


def noise_by_rank(replace: Replace) -> None:
    seed = step.noise_seed
    replace(step, "noise_seed", lambda *key: seed(*key) + dist.get_rank())


def load_counted_by_a_pass_for_shapes(replace: Replace) -> None:
    """Stages that are not told their shapes run a forward pass to find them, and routers count its tokens."""
    from moe_dist.parallel import pipeline

    make = pipeline.WatchedStage

    def wrong(*arguments: Any, input_args: Any, output_args: Any, **options: Any) -> Any:
        return make(*arguments, **options)

    replace(pipeline, "WatchedStage", wrong)


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
