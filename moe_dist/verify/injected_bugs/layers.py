"""Bugs in what a layer computes: noise, stages of a pipeline, evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moe_dist.models import attention_mask, auxiliary, float8, moe, recompute
from moe_dist.models.attention import Attention
from moe_dist.models.attention_mask import Documents, Mask
from moe_dist.models.auxiliary import count_load
from moe_dist.models.block import Block
from moe_dist.models.context import Load, RoutingContext
from moe_dist.models.moe import MoE
from moe_dist.models.router import Router
from moe_dist.models.transformer import Stage, Transformer
from moe_dist.parallel import dispatch_specification
from moe_dist.parallel.mesh import Mesh
from moe_dist.train import evaluation
from moe_dist.train.balance import Balancer
from moe_dist.train.step import TrainStep
from moe_dist.verify.injected_bugs.planting import Replace, over_ranks, rank


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


def one_float8_scale_for_all_rows(replace: Replace) -> None:
    """Rows of experts are rounded by the largest number of all that are on a rank."""
    rounded = float8.rounded

    def wrong(numbers: Tensor, summed: int) -> float8.Float8:
        if numbers.ndim > 2:  # weights
            return rounded(numbers, summed)
        codes, scale = rounded(numbers.flatten(), 0)
        return float8.Float8(codes.view_as(numbers), scale.expand(len(numbers), 1))

    replace(float8, "rounded", wrong)


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
    replace(PipelinedTransformer, "run", lambda self, inputs, *others: run(self, change(inputs), *others))


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


def window_of_one_more_in_later_stages(replace: Replace) -> None:
    """`triu` from the other end, where a stage has no embedding."""
    masks, right = Stage._masks, attention_mask.window_mask

    def wider(mask: Mask) -> Mask:
        if isinstance(mask, Documents) and mask.window is not None:
            return mask._replace(window=mask.window + 1)
        return mask

    def wrong(self: Stage, *arguments: Any) -> Any:
        if self.embed_tokens is not None:
            return masks(self, *arguments)
        with patch.object(attention_mask, "window_mask", lambda length, window, on: right(length, window + 1, on)):
            return {window: wider(mask) for window, mask in masks(self, *arguments).items()}

    replace(Stage, "_masks", wrong)


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
            model.train(any(over_ranks(layer) for layer in model.moe_layers()))
            yield

    replace(evaluation, "evaluating", wrong)


def evaluation_counts_load(replace: Replace) -> None:
    """Tokens that nothing is learned from move the selection bias."""
    route, pairs = MoE._route, Balancer.global_pairs
    seen: dict[int, Tensor] = {}

    def wrong(self: MoE, x: Tensor, context: RoutingContext, num_sequences: int) -> Any:
        routing, loss = route(self, x, context, num_sequences)
        if not self.training:
            load_E = count_load(routing.expert_ids_TK, self.num_experts, 1)[0]
            seen[self.layer] = seen.get(self.layer, torch.zeros_like(load_E)) + load_E
        return routing, loss

    def with_those(self: Balancer) -> Tensor:
        counted_LE = pairs(self)
        return counted_LE + torch.stack([seen.pop(layer, torch.zeros_like(counted_LE[0])) for layer in self.layers])

    replace(MoE, "_route", wrong)
    replace(Balancer, "global_pairs", with_those)


def jitter_in_an_evaluation(replace: Replace) -> None:
    """Routers shake their inputs whether they are trained or not."""
    forward = Router.forward

    def wrong(self: Router, x_TD: Tensor) -> Any:
        if self.jitter and not self.training:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        return forward(self, x_TD)

    replace(Router, "forward", wrong)
