"""Bugs in what ranks do together, whatever is trained: reductions, norms, losses, seeds."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.models import auxiliary, initial_weights, moe
from moe_dist.models.auxiliary import LoadBalance
from moe_dist.models.router import Router
from moe_dist.parallel.engines.gradient_buffer import GradientBuffer
from moe_dist.parallel.engines.optimizer import LogicalOptimizer
from moe_dist.parallel.engines.replicated import ReplicatedEngine
from moe_dist.parallel.mesh import Mesh
from moe_dist.train import step
from moe_dist.train.balance import Balancer
from moe_dist.train.step import TrainStep
from moe_dist.verify.injected_bugs.planting import Replace, after_reduce
from moe_dist.verify.scenarios import NUM_STEPS


def expert_gradient_times_ep(replace: Replace) -> None:
    after_reduce(replace, lambda gradients: gradients.experts.flat.mul_(gradients.mesh.layout.ep_size))


def expert_gradient_averaged_over_edp(replace: Replace) -> None:
    after_reduce(replace, lambda gradients: gradients.experts.flat.div_(gradients.mesh.layout.edp_size))


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

    def wrong(self: moe.MoE, ids: Tensor, valid: Tensor | None) -> Tensor | int:
        group = getattr(self.dispatcher, "ep_size", 1)
        return capacity(self, ids, valid) * group

    replace(moe.MoE, "_capacity", wrong)


def noise_by_rank(replace: Replace) -> None:
    seed = step.noise_seed
    replace(step, "noise_seed", lambda *key: seed(*key) + dist.get_rank())
