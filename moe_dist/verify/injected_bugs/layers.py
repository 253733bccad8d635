"""Bugs in what a layer computes: noise, routing, auxiliary losses, stages of a pipeline, evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moe_dist.models import auxiliary, moe, recompute
from moe_dist.models.attention import Attention
from moe_dist.models.auxiliary import LoadBalance
from moe_dist.models.context import Load, RoutingContext
from moe_dist.models.moe import LocalDispatcher, MoE
from moe_dist.models.router import ExpertChoiceRouter, Router, TopK, TopKRouter
from moe_dist.models.transformer import Block, Transformer
from moe_dist.parallel import dispatch_specification
from moe_dist.parallel.dispatch import AllToAllDispatcher
from moe_dist.parallel.mesh import Mesh
from moe_dist.train import build, evaluation
from moe_dist.train.balance import Balancer
from moe_dist.train.step import TrainStep
from moe_dist.verify.injected_bugs.planting import Replace, rank


def _by_rank() -> None:
    """Seed what follows in this layer by rank, too."""
    torch.manual_seed(torch.initial_seed() + rank())


def attention_dropout_by_rank(replace: Replace) -> None:
    """Every rank drops other weights of attention, and so every way to share out micro-batches."""
    forward = Attention.forward

    def wrong(self: Attention, *arguments: Any) -> Tensor:
        if self.training and self.dropout:
            _by_rank()
        return forward(self, *arguments)

    replace(Attention, "forward", wrong)


def expert_dropout_by_rank(replace: Replace) -> None:
    """Every rank drops other experts."""
    route = MoE._route

    def wrong(self: MoE, *arguments: Any, **options: Any) -> Any:
        if self.training and self.expert_dropout:
            _by_rank()
        return route(self, *arguments, **options)

    replace(MoE, "_route", wrong)


def noise_of_own_experts_by_rank(replace: Replace) -> None:
    """Experts of a person's own class draw by the rank a row came from."""
    draw = moe.draw_seed
    replace(moe, "draw_seed", lambda: draw() + rank())


def noise_by_stages_of_one_length(replace: Replace) -> None:
    """A layer's noise by its number as it were if all stages had as many layers."""
    from moe_dist.parallel.pipeline import PipelinedTransformer, PipelinePart

    make, forward = PipelinedTransformer.__init__, PipelinePart.forward
    shifts: dict[PipelinePart, int] = {}

    def remember(self: PipelinedTransformer, *arguments: Any) -> None:
        make(self, *arguments)
        for stage, part in zip(self.numbers, self._parts, strict=True):
            first = min(int(layer) for layer in part.layers)
            shifts[part] = stage * self.config.num_hidden_layers // len(self.pp_ranks) - first

    def wrong(self: PipelinePart, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if options.get("noise") is not None:
            options["noise"] += shifts[self]
        return forward(self, x, *arguments, **options)

    replace(PipelinedTransformer, "__init__", remember)
    replace(PipelinePart, "forward", wrong)


def _noise_by_stage(replace: Replace, wanted: Callable[[MoE], float]) -> None:
    """Layers of which `wanted` is not zero draw by the number of their stage, too."""
    from moe_dist.parallel.pipeline import PipelinedTransformer

    make, route = PipelinedTransformer.__init__, MoE._route
    stages: dict[int, int] = {}

    def remember(self: PipelinedTransformer, *arguments: Any) -> None:
        make(self, *arguments)
        for stage, part in zip(self.numbers, self._parts, strict=True):
            stages.update(dict.fromkeys((int(layer) for layer in part.layers), stage))

    def wrong(self: MoE, *arguments: Any, **options: Any) -> Any:
        if self.training and wanted(self):
            torch.manual_seed(torch.initial_seed() + stages.get(self.layer, 0))
        return route(self, *arguments, **options)

    replace(PipelinedTransformer, "__init__", remember)
    replace(MoE, "_route", wrong)


def expert_dropout_by_stage(replace: Replace) -> None:
    """Every stage of a pipeline drops other experts."""
    _noise_by_stage(replace, lambda layer: layer.expert_dropout)


def jitter_by_stage(replace: Replace) -> None:
    """Routers shake their inputs by the stage they are in."""
    _noise_by_stage(replace, lambda layer: layer.router.jitter)


def recomputation_without_its_noise(replace: Replace) -> None:
    """`preserve_rng_state=False`: what is repeated in backward draws anew."""

    @contextmanager
    def wrong(self: Any) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]), self.autocast():
            yield

    replace(recompute._Pass, "_as_at_first", wrong)


def load_counted_again_in_recomputation(replace: Replace) -> None:
    """A pass that is repeated counts its tokens a second time."""
    replace(auxiliary, "is_recomputing", lambda: False)


def _over_ranks(layer: MoE) -> bool:
    """Whether its experts are on several."""
    return not isinstance(layer.dispatcher, LocalDispatcher)


def _in_layers_over_ep(replace: Replace, change: Callable[[MoE, int], object]) -> None:
    """`change(layer, ep_size)` to every layer whose experts are on several ranks."""
    parallelize = build.parallelize

    def wrong(model: Transformer, config: Any, mesh: Mesh, *more: Any) -> None:
        parallelize(model, config, mesh, *more)
        for layer in model.moe_layers() if mesh.group("ep") is not None else ():
            change(layer, mesh.layout.ep_size)

    replace(build, "parallelize", wrong)


def groups_ignored_by_expert_parallelism(replace: Replace) -> None:
    """The k best of all experts, whatever group they are in."""
    _in_layers_over_ep(replace, lambda layer, ep_size: setattr(layer.router.rule, "n_group", 1))


def z_loss_times_ep(replace: Replace) -> None:
    """Counted once for every rank that holds experts of the layer."""
    _in_layers_over_ep(replace, lambda layer, ep_size: setattr(layer.balance, "z_coef", ep_size * layer.balance.z_coef))


def sequence_scope_over_the_micro_batch(replace: Replace) -> None:
    """Load is counted over all sequences of a micro-batch together."""
    _in_layers_over_ep(replace, lambda layer, ep_size: setattr(layer.balance, "scope", "micro_batch"))


def temperature_forgotten_by_expert_parallelism(replace: Replace) -> None:
    """The schedule is told to layers that have all their experts."""
    set_temperature = TrainStep.set_temperature

    def wrong(self: TrainStep, step: int) -> None:
        set_temperature(self, step)
        for layer in self.model.moe_layers():
            if _over_ranks(layer):
                layer.router.logits_temperature = 1.0

    replace(TrainStep, "set_temperature", wrong)


def temperature_of_the_weights_alone(replace: Replace) -> None:
    """Experts over ranks are chosen by the logits as they were before it."""
    pick = TopKRouter.pick

    def wrong(self: TopKRouter, log_scores: Tensor, bias: Tensor | None = None) -> TopK:
        before = self.log_scores(log_scores * vars(self).get("temperature", 1.0))  # a softmax knows no common summand
        with patch.object(self, "choose", lambda scores, bias: TopKRouter.choose(self, before.detach(), bias)):
            return pick(self, log_scores, bias)

    def tell(layer: MoE, ep_size: int) -> None:
        layer.router.rule.temperature = layer.router.logits_temperature  # type: ignore[assignment]

    _in_layers_over_ep(replace, tell)
    replace(TopKRouter, "pick", wrong)


def annealing_by_micro_batches(replace: Replace) -> None:
    """A schedule of a pipeline counts as a step what passes through it: a micro-batch."""
    set_temperature = TrainStep.set_temperature

    def wrong(self: TrainStep, step: int) -> None:
        pipeline = self.mesh.layout.pp_size > 1
        set_temperature(self, step * (self.config.train.gradient_accumulation_steps if pipeline else 1))

    replace(TrainStep, "set_temperature", wrong)


def fallbacks_of_every_rank_of_ep(replace: Replace) -> None:
    """A token that falls back is counted by every rank that holds experts of the layer."""
    record = LoadBalance._record_fallbacks

    def wrong(self: LoadBalance, *arguments: Any) -> None:
        for _ in range(vars(self).get("ep_size", 1)):
            record(self, *arguments)

    _in_layers_over_ep(replace, lambda layer, ep_size: setattr(layer.balance, "ep_size", ep_size))
    replace(LoadBalance, "_record_fallbacks", wrong)


def fallbacks_are_load_twice(replace: Replace) -> None:
    """Tokens that fall back are added to the fallback expert's load, in which they are already."""
    route = MoE._route

    def wrong(self: MoE, x_TD: Tensor, context: RoutingContext, **options: Any) -> Any:
        routing, loss = route(self, x_TD, context, **options)
        failed_T, facts, expert = routing.failed_T, self.balance.facts, self.router.fallback_expert
        if failed_T is not None and facts is not None and self.training and not recompute.is_recomputing():
            facts.pairs_E[expert] += (failed_T if context.valid_T is None else failed_T & context.valid_T).sum()
        return routing, loss

    replace(MoE, "_route", wrong)


def fallback_on_the_first_rank(replace: Replace) -> None:
    """Elsewhere tokens that fail go where equal logits send them."""
    fall_back = Router._fall_back

    def wrong(self: Router, failed_T: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        return (ids_TK, weights_TK) if rank() else fall_back(self, failed_T, ids_TK, weights_TK)

    replace(Router, "_fall_back", wrong)


def experts_choose_for_the_whole_group(replace: Replace) -> None:
    """An expert has places for the tokens of all ranks that send to it, and takes as many from each."""
    take = ExpertChoiceRouter._take

    def wrong(self: ExpertChoiceRouter, *arguments: Any) -> Tensor:
        with patch.object(self.rule, "top_k", self.rule.top_k * vars(self).get("ep_size", 1)):
            return take(self, *arguments)

    _in_layers_over_ep(replace, lambda layer, ep_size: setattr(layer.router, "ep_size", ep_size))
    replace(ExpertChoiceRouter, "_take", wrong)


def experts_choose_padding(replace: Replace) -> None:
    """Routers of layers over `ep` are not told which tokens are padding: these take places, and then go nowhere."""
    _in_layers_over_ep(replace, lambda layer, ep_size: setattr(layer.router, "takes_valid", False))


def scores_scaled_twice(replace: Replace) -> None:
    """The rule of the router has multiplied by `routed_scaling_factor` already."""
    route = MoE._route

    def wrong(self: MoE, *arguments: Any, **options: Any) -> Any:
        routing, loss = route(self, *arguments, **options)
        if _over_ranks(self):
            weights = routing.weights_TK * self.router.rule.scaling_factor
            routing = dataclasses.replace(routing, weights_TK=weights)
        return routing, loss

    replace(MoE, "_route", wrong)


def experts_of_the_tenth_layer_in_reverse(replace: Replace) -> None:
    """Tokens go to the block of experts as counted from the last rank; past the depth of small models."""
    dispatch = AllToAllDispatcher.dispatch

    def wrong(self: AllToAllDispatcher, x_TD: Tensor, routing: Any) -> Any:
        if self.layer == 9:
            ids, block = routing.expert_ids_TK, self.num_experts // self.ep_size
            turned = (self.ep_size - 1 - ids // block) * block + ids % block
            routing = dataclasses.replace(routing, expert_ids_TK=torch.where(ids < self.num_experts, turned, ids))
        return dispatch(self, x_TD, routing)

    replace(AllToAllDispatcher, "dispatch", wrong)


def capacity_counts_padding(replace: Replace) -> None:
    """Padding makes room for more tokens where experts are on several ranks."""
    capacity = MoE._capacity

    def wrong(self: MoE, ids: Tensor, valid: Tensor | None) -> Tensor:
        return capacity(self, ids, None if _over_ranks(self) else valid)

    replace(MoE, "_capacity", wrong)


def global_load_is_local_in_a_sharded_pipeline(replace: Replace) -> None:
    """What a pass over all micro-batches has counted is not summed over replicas."""
    take = Balancer.take_global_load

    def wrong(self: Balancer) -> dict[int, Load]:
        sharded = any(isinstance(layer.experts, FSDPModule) for layer in self.layers.values())
        if not sharded or self.mesh.layout.pp_size == 1:
            return take(self)
        with patch.object(Mesh, "sum_over", lambda self, axis, tensor: tensor):
            return take(self)

    replace(Balancer, "take_global_load", wrong)


def queries_not_normed_in_later_stages(replace: Replace) -> None:
    """Only the first stage of a pipeline has its norms of queries and keys."""
    from moe_dist.parallel.pipeline import PipelinedTransformer

    make = PipelinedTransformer.__init__

    def wrong(self: PipelinedTransformer, *arguments: Any) -> None:
        make(self, *arguments)
        for part in self._parts:
            for block in part.layers.values() if part.embed_tokens is None else ():
                for norm in (cast(Block, block).attention.q_norm, cast(Block, block).attention.k_norm):
                    vars(norm)["forward"] = lambda x: x

    replace(PipelinedTransformer, "__init__", wrong)


def _in_every_pipeline(replace: Replace, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Inputs of all micro-batches of a step, changed on their way into the schedule."""
    from moe_dist.parallel.pipeline import PipelinedTransformer

    run = PipelinedTransformer.run
    replace(PipelinedTransformer, "run", lambda self, inputs, loss_of: run(self, change(inputs), loss_of))


def positions_of_the_first_micro_batch(replace: Replace) -> None:
    """One table of rotary positions for all micro-batches of a step."""
    _in_every_pipeline(
        replace, lambda batches: [batch | {"position_ids": batches[0]["position_ids"]} for batch in batches]
    )


def domains_lost_in_a_pipeline(replace: Replace) -> None:
    """Stages are not told where their tokens come from."""

    def change(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [b | {"context": dataclasses.replace(b["context"], domain_ids_BS=None)} for b in batches]

    _in_every_pipeline(replace, change)


def documents_kept_apart_in_a_pipeline(replace: Replace) -> None:
    """`data.document_mask: false` is not asked."""
    inputs = TrainStep._inputs

    def wrong(self: TrainStep, *arguments: Any) -> dict[str, Any]:
        if self.mesh.layout.pp_size == 1:
            return inputs(self, *arguments)
        with patch.object(self.config.data, "document_mask", True):
            return inputs(self, *arguments)

    replace(TrainStep, "_inputs", wrong)


def gathered_tokens_learn_from_one_rank(replace: Replace) -> None:
    """Backward of the all-gather takes this rank's slice without the sum over those whose experts saw it."""

    def wrong(ctx: Any, *gradients: Tensor) -> Any:
        sizes, group = ctx.arguments
        return gradients[0].split(sizes)[group.rank()], None, None

    replace(dispatch_specification._AllGather, "backward", wrong)


def evaluation_keeps_documents_apart(replace: Replace) -> None:
    """`data.document_mask: false` is for training alone."""
    inputs = evaluation.model_inputs
    replace(evaluation, "model_inputs", lambda batch, **options: inputs(batch))


def evaluation_in_training_mode(replace: Replace) -> None:
    """Dropout, jitter and capacity where experts are on several ranks."""
    evaluating = evaluation.evaluating

    @contextmanager
    def wrong(model: Transformer) -> Iterator[None]:
        with evaluating(model):
            model.train(any(_over_ranks(layer) for layer in model.moe_layers()))
            yield

    replace(evaluation, "evaluating", wrong)


def evaluation_counts_load(replace: Replace) -> None:
    """Tokens that nothing is learned from move the selection bias."""
    route = MoE._route

    def wrong(self: MoE, x: Tensor, context: RoutingContext, num_sequences: int) -> Any:
        routing, loss = route(self, x, context, num_sequences)
        if not self.training:
            self.balance.losses(routing, num_sequences, context)
        return routing, loss

    replace(MoE, "_route", wrong)


def jitter_in_an_evaluation(replace: Replace) -> None:
    """Routers shake their inputs whether they are trained or not."""
    forward = Router.forward

    def wrong(self: Router, x_TD: Tensor) -> Any:
        if self.jitter and not self.training:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        return forward(self, x_TD)

    replace(Router, "forward", wrong)
