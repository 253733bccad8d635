"""The mixture-of-experts layer: router -> dispatch -> experts -> combine.

Shape suffixes: B batch, S sequence, T = B * S tokens, D hidden, E experts, K top-k, R rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.auxiliary import LoadBalance, inject_loss
from moe_dist.models.context import ALONE, RoutingContext
from moe_dist.models.experts import CopiedRows, build_experts
from moe_dist.models.layers import Linear, SwiGLU
from moe_dist.models.noise import Sources, draw_seed
from moe_dist.models.permute import (
    Permutation,
    place_by_expert,
    rows_from_tokens,
    sort_by_expert,
    tokens_from_rows,
)
from moe_dist.models.precision import full
from moe_dist.models.router import build_router
from moe_dist.models.routing import Routing, drop_over_capacity
from moe_dist.models.shares import written


class Dispatcher(Protocol):
    """Brings tokens to experts and back. It keeps no state between its verbs: what they answer carries it.

    Each way is begun and ended: what is computed in between hides it. All ranks call the same in the same order.
    """

    def begin_dispatch(self, x_TD: Tensor, routing: Routing, num_pieces: int = 1) -> list[Any]:
        """(T, D): tokens set out, in up to so many pieces of neighbours, as many on every rank; answers one after the
        other for `end_dispatch`."""
        ...

    def end_dispatch(self, departed: Any) -> tuple[Tensor, Any]:
        """(R, D) rows sorted by local expert, and a frozen plan whose `rows_per_expert` (e,) counts them.

        Its `sources` tell whose they are when the routing has a `noise_seed`, and are None otherwise.
        """
        ...

    def begin_combine(self, rows_RD: Tensor, plan: Any) -> Any:
        """(R, D): rows of one piece set out for home."""
        ...

    def end_combine(self, returning: Any) -> Tensor:
        """(T, D) of one piece: each token's rows weighted by its routing weights and summed."""
        ...


class AtOnce(ABC):
    """A dispatcher of two verbs: nothing is hidden, and there is one piece."""

    @abstractmethod
    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Any]:
        """(T, D) -> rows and plan, as of `Dispatcher.end_dispatch`."""

    @abstractmethod
    def combine(self, rows_RD: Tensor, plan: Any) -> Tensor:
        """(R, D) -> (T, D)."""

    def begin_dispatch(self, x_TD: Tensor, routing: Routing, num_pieces: int = 1) -> list[tuple[Tensor, Any]]:
        return [self.dispatch(x_TD, routing)]

    def end_dispatch(self, departed: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return departed

    def begin_combine(self, rows_RD: Tensor, plan: Any) -> Tensor:
        return self.combine(rows_RD, plan)

    def end_combine(self, returning: Tensor) -> Tensor:
        return returning


@dataclass(frozen=True)
class LocalPlan:
    """A permutation of this rank's own pairs, the routing weights (T, K), and the routing's seed of noise."""

    permutation: Permutation
    weights_TK: Tensor
    noise_seed: int | None

    @property
    def rows_per_expert(self) -> Tensor:
        return self.permutation.rows_per_expert

    @property
    def sources(self) -> Sources | None:
        return None if self.noise_seed is None else Sources(self.rows_per_expert[None], [self.noise_seed])


class LocalDispatcher(AtOnce):
    """All experts are here: dispatch is a sort, combine its inverse. `static`: where the routing says how many places
    suffice, every expert gets as many rows, and nothing waits for the device (`parallel.dispatcher: static`)."""

    def __init__(self, num_experts: int, kernels: str = "torch", *, static: bool = False) -> None:
        self.num_experts, self.kernels, self.static = num_experts, kernels, static

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, LocalPlan]:
        ids_TK = routing.expert_ids_TK
        if self.static and routing.places is not None:
            permutation = place_by_expert(ids_TK, self.num_experts, routing.places, self.kernels)
        else:
            num_rows = None if routing.complete else int((ids_TK < self.num_experts).sum())
            permutation = sort_by_expert(ids_TK, self.num_experts, num_rows, self.kernels)
        return rows_from_tokens(x_TD, permutation), LocalPlan(permutation, routing.weights_TK, routing.noise_seed)

    def combine(self, rows_RD: Tensor, plan: LocalPlan) -> Tensor:
        return tokens_from_rows(rows_RD, plan.weights_TK, plan.permutation)


@dataclass(frozen=True)
class Staying:
    """Pairs whose experts have copies here: their rows, and how these become tokens again."""

    rows: CopiedRows
    dispatcher: LocalDispatcher
    plan: LocalPlan

    def combine(self, rows_RD: Tensor) -> Tensor:
        """What the copies answer -> (T, D)."""
        return self.dispatcher.combine(rows_RD, self.plan)


class Copies(Protocol):
    """Experts of a layer that every rank computes for its own tokens."""

    def keep(self, x_TD: Tensor, routing: Routing) -> tuple[Staying | None, Routing]:
        """What stays on this rank, and what is left to be dispatched; None, and all, where there are no copies."""
        ...


class MoE(nn.Module):
    """A layer of E experts of which each token uses K, and optionally a shared expert every token uses.

    `layer` is the block's global number; it names the layer in errors and facts.
    """

    dispatch_chunks = 1
    """Pieces in which tokens travel in training (`parallel.dispatch_chunks`)."""
    copies: Copies | None = None
    """Of hot experts (`parallel.replicated_experts`)."""

    def __init__(self, config: ModelConfig, balance: BalanceConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.num_experts, self.top_k = layer, config.num_experts, config.num_experts_per_tok
        self.router = build_router(config, balance)
        self.experts = build_experts(config)
        self.dispatcher: Dispatcher = LocalDispatcher(config.num_experts)
        self.balance = LoadBalance(balance, config.num_experts, config.num_experts_per_tok, layer)
        self.capacity_factor, self.expert_dropout = balance.capacity_factor, balance.expert_dropout
        self.shared_expert = (
            SwiGLU(config.hidden_size, config.shared_expert_intermediate_size, config.hidden_act)
            if config.shared_expert_intermediate_size
            else None
        )
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x_BSD: Tensor, context: RoutingContext = ALONE) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x_TD = x_BSD.flatten(0, 1)
        routing, auxiliary_loss = self._route(x_TD, context, num_sequences=x_BSD.shape[0])
        num_pieces = self.dispatch_chunks if self.training and self.experts.comes_in_pieces else 1
        staying = None
        if self.copies is not None:
            staying, routing = self.copies.keep(x_TD, routing)
        departed = self.dispatcher.begin_dispatch(x_TD, routing, num_pieces)
        shared_TD = self._shared(x_TD)  # while the first rows travel
        out_TD = self._through_experts(departed, staying)
        if shared_TD is not None:
            out_TD = out_TD + shared_TD
        if auxiliary_loss is not None:
            out_TD = inject_loss(out_TD, auxiliary_loss)
        return out_TD.view_as(x_BSD)

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        """What the shared expert makes of all tokens; None without one."""
        if self.shared_expert is None:
            return None
        shared_TD = self.shared_expert(x_TD)
        if self.shared_expert_gate is not None:
            shared_TD = self.shared_expert_gate(x_TD).sigmoid() * shared_TD
        return shared_TD

    def _through_experts(self, departed: list[Any], staying: Staying | None) -> Tensor:
        """Pieces under way -> (T, D): experts compute one while the next comes and the one before goes home. What stays
        is computed with the first."""
        out, returning, stayed_TD = [], None, None
        for piece in departed:
            rows_RD, plan = self.dispatcher.end_dispatch(piece)
            if staying is not None and stayed_TD is None:
                rows_RD, stayed_RD = self.experts(rows_RD, plan.rows_per_expert, copied=staying.rows)
                stayed_TD = staying.combine(stayed_RD)
            elif plan.sources is None:
                rows_RD = self.experts(rows_RD, plan.rows_per_expert)
            else:
                rows_RD = self.experts(rows_RD, plan.rows_per_expert, plan.sources)
            if returning is not None:
                out.append(self.dispatcher.end_combine(returning))
            returning = self.dispatcher.begin_combine(rows_RD, plan)
        out.append(self.dispatcher.end_combine(returning))
        out_TD = torch.cat(out) if len(out) > 1 else out[0]
        return out_TD if stayed_TD is None else out_TD + stayed_TD

    def reach_experts_by(self, dispatcher: Dispatcher) -> None:
        """Tokens go to experts and come back by this dispatcher, wherever they are."""
        self.dispatcher = dispatcher

    def _route(self, x_TD: Tensor, context: RoutingContext, num_sequences: int) -> tuple[Routing, Tensor | None]:
        """The router's decision after padding, load accounting, capacity, expert dropout, in this order."""
        valid_T = context.valid_T
        arguments = (full(x_TD), valid_T) if self.router.takes_valid else (full(x_TD),)
        with torch.autocast(x_TD.device.type, enabled=False):  # routers compute in full precision, own ones too
            routing = Routing.of(self.router(*arguments))
        ids_TK = routing.expert_ids_TK
        if valid_T is not None:
            ids_TK = ids_TK.masked_fill(~valid_T[:, None], self.num_experts)
            routing = replace(routing, expert_ids_TK=ids_TK, complete=False)
        auxiliary_loss = None
        if self.training:
            # Before any drop: balancing must see what the router wanted, not what found a place.
            auxiliary_loss = self.balance.losses(routing, num_sequences, context)
        if self.capacity_factor is not None and self.training:
            kept_TK = drop_over_capacity(ids_TK, self.num_experts, self._capacity(ids_TK, valid_T))
            self.balance.record_dropped(ids_TK, kept_TK)
            places = None if self.experts.draws_noise else self._places(len(ids_TK))
            routing = replace(routing, expert_ids_TK=kept_TK, complete=False, places=places)
        if self.expert_dropout and self.training:
            routing = replace(routing, weights_TK=F.dropout(routing.weights_TK, self.expert_dropout))
        if self.experts.draws_noise:
            routing = replace(routing, noise_seed=draw_seed())
        return routing, auxiliary_loss

    def _capacity(self, ids_TK: Tensor, valid_T: Tensor | None) -> Tensor | int:
        """Places per expert for the valid tokens of this micro-batch; where padding must be counted 0-dim int64."""
        if valid_T is None:
            return self._places(len(ids_TK))
        # Whole numbers: the product of floats may lie above the integer that it is.
        fair = self._fair_share
        capacity = (valid_T.sum() * fair.numerator + fair.denominator - 1).div(fair.denominator, rounding_mode="floor")
        return capacity.clamp(min=1)

    def _places(self, num_tokens: int) -> int:
        """Places per expert for so many tokens: as many as a micro-batch of these has with padding in it, or more."""
        return max(1, math.ceil(num_tokens * self._fair_share))

    @property
    def _fair_share(self) -> Fraction:
        """Places of an expert for each token."""
        assert self.capacity_factor is not None
        return written(self.capacity_factor) * self.top_k / self.num_experts
