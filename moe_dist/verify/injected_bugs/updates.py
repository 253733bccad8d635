"""Bugs between the loss and the new weights: scales, reductions of gradients, norms, optimizers, balancing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moe_dist.models import swiglu
from moe_dist.models.transformer import Transformer
from moe_dist.parallel import row_exchange
from moe_dist.parallel.engines import fsdp, gradient_buffer
from moe_dist.parallel.engines.deepspeed import DeepSpeedEngine
from moe_dist.parallel.engines.fsdp import FSDPEngine
from moe_dist.parallel.engines.gradient_buffer import GradientBuffer
from moe_dist.parallel.engines.optimizer import LogicalOptimizer, local
from moe_dist.parallel.engines.replicated import ReplicatedEngine
from moe_dist.parallel.engines.row_sum import RowSum, Started
from moe_dist.train import loss as loss_module
from moe_dist.train import step
from moe_dist.train.balance import Balancer
from moe_dist.train.step import TrainStep
from moe_dist.verify.injected_bugs.planting import Replace, rank


def label_smoothing_ignored_by_fsdp(replace: Replace) -> None:
    """The loss of a sharded model is the plain one."""
    accumulate, right = TrainStep.accumulate, step.head_cross_entropy

    def plain(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, **options: Any) -> Tensor:
        return right(hidden, weight, labels, **options)

    def wrong(self: TrainStep, *arguments: Any) -> Tensor:
        if not isinstance(self.engine, FSDPEngine):
            return accumulate(self, *arguments)
        with patch.object(step, "head_cross_entropy", plain):
            return accumulate(self, *arguments)

    replace(TrainStep, "accumulate", wrong)


def head_learns_from_the_last_chunk(replace: Replace) -> None:
    """The gradient of the head's weight is that of the last chunk of tokens: written where it should be added."""

    def wrong(total_VD: Tensor, d_logits_CV: Tensor, x_CD: Tensor) -> None:
        total_VD.copy_(d_logits_CV.t() @ x_CD)

    replace(loss_module, "_add_product", wrong)


def experts_learn_from_the_last_chunk(replace: Replace) -> None:
    """The gradients of experts are those of the last chunk of their rows."""
    replace(swiglu, "_added", lambda total, part: part)


def ignored_labels_in_the_scale(replace: Replace) -> None:
    """The sum over valid tokens is divided by all there are."""
    count = TrainStep._count_tokens

    def wrong(self: TrainStep, batches: list) -> Tensor:
        counts = count(self, batches)
        labels = torch.tensor(sum(batch.labels.numel() for batch in batches), device=counts.device)
        counts[0] = self.mesh.sum_over("dp", labels)
        return counts

    replace(TrainStep, "_count_tokens", wrong)


def micro_batches_weigh_alike(replace: Replace) -> None:
    """A mean of means: a micro-batch with few labels counts as much as one with many."""
    accumulate, loss_sum = TrainStep.accumulate, step.head_cross_entropy

    def wrong(self: TrainStep, batches: list, counts: Tensor, number: int) -> Tensor:
        fair = counts[0] / (len(batches) * self.mesh.layout.dp_size)

        def alike(hidden: Tensor, weight: Tensor, labels: Tensor, *arguments: Any, **options: Any) -> Tensor:
            loss = loss_sum(hidden, weight, labels, *arguments, **options)
            return loss * fair / (labels >= 0).sum().clamp(min=1)

        with patch.object(step, "head_cross_entropy", alike):
            return accumulate(self, batches, counts, number)

    replace(TrainStep, "accumulate", wrong)


def tied_weight_counted_twice(replace: Replace) -> None:
    """Once as the embedding and once as the head, in the norm of sharded gradients."""
    norm = FSDPEngine.norm

    def wrong(self: FSDPEngine) -> Tensor:
        tied = [self.views["embed_tokens.weight"]] if self.model.config.tie_word_embeddings else []
        return (norm(self).square() + self.mesh.sum_over("dp_shard", self._squared_norm(tied))).sqrt()

    replace(FSDPEngine, "norm", wrong)


def clipped_by_a_local_norm(replace: Replace) -> None:
    """The norm that is reported is the global one; gradients are scaled by that of this rank's own part."""
    clip = ReplicatedEngine.clip

    def wrong(self: ReplicatedEngine, norm: Tensor, max_norm: float) -> None:
        clip(self, (self.dense.squared_norm() + self.experts.squared_norm()).sqrt(), max_norm)

    replace(ReplicatedEngine, "clip", wrong)


def deepspeed_does_not_clip(replace: Replace) -> None:
    """Our norm, and nobody who uses it."""
    replace(DeepSpeedEngine, "clip", lambda self, norm, max_norm: None)


def _reduced_as_experts(replace: Replace, part: str) -> None:
    """Gradients of parameters with `part` in their names summed over edp, as if each `ep` rank had its own."""
    make, names = ReplicatedEngine.__init__, Transformer.expert_parameter_names

    def wrong(self: ReplicatedEngine, model: Transformer, *more: Any) -> None:
        alike = {name for name, _ in model.named_parameters() if part in name}
        with patch.object(Transformer, "expert_parameter_names", lambda model: names(model) | alike):
            make(self, model, *more)

    replace(ReplicatedEngine, "__init__", wrong)


def shared_expert_reduced_as_an_expert(replace: Replace) -> None:
    """It has `expert` in its name."""
    _reduced_as_experts(replace, ".shared_expert.")


def dense_layer_reduced_as_an_expert(replace: Replace) -> None:
    """It is where other layers have their experts."""
    _reduced_as_experts(replace, ".mlp.")


def expert_gradients_of_the_last_micro_batch(replace: Replace) -> None:
    """Shards of experts' gradients are overwritten, not added to, where parameters are freed in between."""
    backward = FSDPEngine.backward

    def wrong(self: FSDPEngine, loss: Tensor) -> None:
        for name in self.expert_names if self.zero_stage == 3 else ():
            self.parameters[name].grad = None
        backward(self, loss)

    replace(FSDPEngine, "backward", wrong)


def half_gradients_of_experts_doubled(replace: Replace) -> None:
    """Two hooks each add a bfloat16 gradient to the buffer."""
    make = GradientBuffer.__init__

    def double(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.mul_(2)

    def wrong(self: GradientBuffer, named: Any, *others: Any) -> None:
        parameters: dict[str, nn.Parameter] = dict(named)
        for name, parameter in parameters.items():
            if ".experts." in name and parameter.dtype == torch.bfloat16:
                parameter.register_post_accumulate_grad_hook(double)
        make(self, parameters.items(), *others)

    replace(GradientBuffer, "__init__", wrong)


def half_rows_doubled_on_the_way_back(replace: Replace) -> None:
    """Gradients of rows in bfloat16 come back twice as large."""
    backward = row_exchange.Arrive.backward

    def wrong(ctx: Any, *gradients: Tensor) -> Any:
        return backward(ctx, *(g * 2 if g.dtype == torch.bfloat16 else g for g in gradients))

    replace(row_exchange.Arrive, "backward", wrong)


def half_gradients_added_up_in_half(replace: Replace) -> None:
    """Micro-batches add up in `.grad`, which has the dtype of the parameter; the buffer gets what is there."""
    zero = GradientBuffer.zero

    def begin(self: GradientBuffer) -> None:
        zero(self)
        for parameter in self.parameters.values():
            if parameter.dtype == torch.bfloat16:
                parameter.grad = None

    def copy(view: Tensor, parameter: Tensor) -> None:
        if parameter.grad is not None:
            view.copy_(parameter.grad)

    replace(GradientBuffer, "zero", begin)
    replace(gradient_buffer, "_add_gradient", copy)


def half_gradients_reduced_in_half(replace: Replace) -> None:
    """FSDP reduces in the dtype of the parameters unless it is told not to."""
    policy = fsdp.MixedPrecisionPolicy
    replace(fsdp, "MixedPrecisionPolicy", lambda **options: policy(**options | {"reduce_dtype": None}))


def own_rows_of_the_embedding_twice(replace: Replace) -> None:
    """Rows that come back, one's own among them, are added to what lies there."""
    start = RowSum.start

    def wrong(self: RowSum) -> Started | None:
        started, own = start(self), self.matrix_VD.clone()
        if started is None:
            return None

        def finish() -> None:
            started.finish()
            self.matrix_VD.add_(own)

        return Started(started.works, finish)

    replace(RowSum, "start", wrong)


def weights_of_shards_in_half(replace: Replace) -> None:
    """A sharded model has been cast before it was cut, so that what an update moves is rounded each time."""
    update = LogicalOptimizer.step

    def wrong(self: LogicalOptimizer, rate: float) -> None:
        update(self, rate)
        for parameter in self.engine.held_parameters().values() if isinstance(self.engine, FSDPEngine) else ():
            local(parameter.detach()).copy_(local(parameter.detach()).bfloat16())

    replace(LogicalOptimizer, "step", wrong)


def frozen_router_decayed_by_fsdp(replace: Replace) -> None:
    """Sharding makes parameters anew, and they have forgotten that they are frozen: no gradient, but weight decay."""
    update = LogicalOptimizer.step

    def wrong(self: LogicalOptimizer, rate: float) -> None:
        update(self, rate)
        group, decayed = self.optimizer.param_groups[0], self.model.decayed_names()
        for name, parameter in self.engine.held_parameters().items():
            if isinstance(parameter, DTensor) and not parameter.requires_grad and name in decayed:
                local(parameter.detach()).mul_(1 - group["lr"] * group["weight_decay"])

    replace(LogicalOptimizer, "step", wrong)


def _decayed_too(replace: Replace, more: Callable[[Transformer], set[str]]) -> None:
    names = Transformer.decayed_names
    replace(Transformer, "decayed_names", lambda self: names(self) | more(self))


def attention_biases_decayed_by_fsdp(replace: Replace) -> None:
    """Weight decay where parameters are sharded: a shard has lost what it was."""

    def biases(model: Transformer) -> set[str]:
        sharded = any(isinstance(module, FSDPModule) for module in model.modules())
        return {name for name, _ in model.named_parameters() if sharded and name.endswith("_proj.bias")}

    _decayed_too(replace, biases)


def stacked_biases_decayed(replace: Replace) -> None:
    """A stack of biases has two dimensions, as a matrix."""
    _decayed_too(replace, lambda model: {name for name in model.stacked_names() if name.endswith(".bias")})


def adafactor_across_experts(replace: Replace) -> None:
    """Stacked experts are one tensor to it: its factors and its scale are of all that a rank holds."""
    make = LogicalOptimizer.__init__

    def wrong(self: LogicalOptimizer, *arguments: Any) -> None:
        with patch.object(Transformer, "stacked_names", lambda model: set()):
            make(self, *arguments)

    replace(LogicalOptimizer, "__init__", wrong)


def bias_from_one_replica(replace: Replace) -> None:
    """The selection bias moves by what the first replica has seen."""

    def wrong(self: Balancer) -> Tensor:
        pairs = torch.stack([facts.pairs_E for facts in self.facts.values()])
        return self.mesh.sum_over("dp", torch.zeros_like(pairs) if self.mesh.dp_rank else pairs)

    replace(Balancer, "global_pairs", wrong)


def rate_by_rank(replace: Replace) -> None:
    """The schedule counts what ranks before this one have done, too."""
    from moe_dist.train import loop, schedule

    rate = schedule.learning_rate

    def wrong(config: Any, number: float, *more: Any) -> float:
        return rate(config, number + rank(), *more)

    replace(schedule, "learning_rate", wrong)
    replace(loop, "learning_rate", wrong)
