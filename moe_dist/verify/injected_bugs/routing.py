"""Bugs in how tokens find their experts: groups, temperatures, fallbacks, capacity, auxiliary losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moe_dist.models import recompute
from moe_dist.models.auxiliary import LoadBalance
from moe_dist.models.context import RoutingContext
from moe_dist.models.moe import MoE
from moe_dist.models.permute import Permutation
from moe_dist.models.router import ExpertChoiceRouter, Router
from moe_dist.models.routing import TopK, TopKRouter
from moe_dist.models.transformer import Transformer
from moe_dist.parallel import dispatch_hop, dispatch_static
from moe_dist.parallel import parallelize as module
from moe_dist.parallel.dispatch import AllToAllDispatcher
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.row_exchange import RowExchange
from moe_dist.train.step import TrainStep
from moe_dist.verify.injected_bugs.planting import Replace, over_ranks, rank


def _in_layers_over_ep(replace: Replace, change: Callable[[MoE, int], object]) -> None:
    """`change(layer, ep_size)` to every layer whose experts are on several ranks."""
    parallelize = module.parallelize

    def wrong(model: Transformer, config: Any, mesh: Mesh, *more: Any) -> None:
        parallelize(model, config, mesh, *more)
        for layer in model.moe_layers() if mesh.group("ep") is not None else ():
            change(layer, mesh.layout.ep_size)

    replace(module, "parallelize", wrong)


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
            if over_ranks(layer):
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
        if over_ranks(self):
            weights = routing.weights_TK * self.router.rule.scaling_factor
            routing = dataclasses.replace(routing, weights_TK=weights)
        return routing, loss

    replace(MoE, "_route", wrong)


def experts_of_the_tenth_layer_in_reverse(replace: Replace) -> None:
    """Tokens go to the block of experts as counted from the last rank; past the depth of small models."""
    dispatch = AllToAllDispatcher.begin_dispatch

    def wrong(self: AllToAllDispatcher, x_TD: Tensor, routing: Any, *others: Any) -> Any:
        if self.layer == 9:
            ids, block = routing.expert_ids_TK, self.num_experts // self.ep_size
            turned = (self.ep_size - 1 - ids // block) * block + ids % block
            routing = dataclasses.replace(routing, expert_ids_TK=torch.where(ids < self.num_experts, turned, ids))
        return dispatch(self, x_TD, routing, *others)

    replace(AllToAllDispatcher, "begin_dispatch", wrong)


def deduplicated_tokens_sent_again(replace: Replace) -> None:
    """A token with two experts on a rank goes there twice, and each time to both."""
    exchange = dispatch_hop.Hop._exchange_counts
    pairs: list[Tensor] = []

    def again(rank_TK: Tensor, none: int) -> Tensor:
        there_TKE = rank_TK[:, :, None] == torch.arange(none, device=rank_TK.device)
        pairs.append(there_TKE.sum(1).square().sum(0))
        return rank_TK.sort(dim=1).values

    def wrong(self: Any, pieces: Any, *others: Any) -> Any:
        counted = [dataclasses.replace(piece, pairs_P=pairs.pop(0)) for piece in pieces]
        return exchange(self, counted, *others)

    replace(dispatch_hop, "_once_each", again)
    replace(dispatch_hop.Hop, "_exchange_counts", wrong)


def last_place_left_empty(replace: Replace) -> None:
    """Where places are fixed, a place is counted before it is taken: the last one of an expert is past the end."""
    place = dispatch_static.place_by_expert

    def wrong(ids_TK: Tensor, num_experts: int, places: int, kernels: str) -> Permutation:
        right = place(ids_TK, num_experts, places, kernels)
        pair_of_row, row_of_pair = right.pair_of_row.clone(), right.row_of_pair
        pair_of_row[places - 1 :: places] = ids_TK.numel()
        is_last = (row_of_pair < right.num_rows) & (row_of_pair % places == places - 1)
        row_of_pair = row_of_pair.masked_fill(is_last, right.num_rows)
        return dataclasses.replace(right, pair_of_row=pair_of_row, row_of_pair=row_of_pair)

    replace(dispatch_static, "place_by_expert", wrong)


def noise_of_another_host(replace: Replace) -> None:
    """Where rows come by two hops, experts take them for those of the rank with the same place on another host."""
    exchange = dispatch_hop.Hop._exchange_counts

    def mixed(coming: Any, hosts: int) -> Any:
        came = coming.origins
        parts = [came.seeds[at : at + hosts] for at in range(0, len(came.seeds), hosts)]
        seeds = [seed for part in parts for seed in reversed(part)]
        return dataclasses.replace(coming, origins=dataclasses.replace(came, seeds=seeds))

    def wrong(self: Any, pieces: Any, *others: Any) -> Any:
        coming, extra = exchange(self, pieces, *others)
        return [mixed(one, piece.rows_PO.shape[1]) for one, piece in zip(coming, pieces, strict=True)], extra

    replace(dispatch_hop.Hop, "_exchange_counts", wrong)


def weights_of_other_ranks_learn_nothing(replace: Replace) -> None:
    """Gradients of routing weights that travelled with a token stay where they are."""
    arrive = RowExchange.arrive

    def wrong(self: RowExchange, departed: Tensor, values: Tensor | None = None) -> Tensor:
        arrived, me = arrive(self, departed, values), self.route.group.rank()
        if values is not None and arrived.requires_grad:
            sizes = self.route.receive_splits
            arrived.register_hook(lambda g: torch.cat([part * (at == me) for at, part in enumerate(g.split(sizes))]))
        return arrived

    replace(RowExchange, "arrive", wrong)


def pieces_home_in_another_order(replace: Replace) -> None:
    """What tokens of the last piece get is given to the first ones."""
    reach = MoE._through_experts
    replace(MoE, "_through_experts", lambda self, departed, *others: reach(self, departed[::-1], *others))


def capacity_counts_padding(replace: Replace) -> None:
    """Padding makes room for more tokens where experts are on several ranks."""
    capacity = MoE._capacity

    def wrong(self: MoE, ids: Tensor, valid: Tensor | None) -> Tensor | int:
        return capacity(self, ids, None if over_ranks(self) else valid)

    replace(MoE, "_capacity", wrong)
