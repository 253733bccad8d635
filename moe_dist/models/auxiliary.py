"""Auxiliary losses of one mixture-of-experts layer, and the facts it keeps about its own load.

Everything is a sum over tokens divided by the number of tokens of the *global batch*, so contributions of
ranks, micro-batches and sequences add up to the same loss in every layout.

Shape suffixes: T tokens, K top-k, E experts, G groups of tokens over which load is counted, N domains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_dist.config import BalanceConfig
from moe_dist.models.context import Load, RoutingContext
from moe_dist.models.precision import full
from moe_dist.models.recompute import is_recomputing, once
from moe_dist.models.routing import Routing


class _InjectLoss(torch.autograd.Function):
    """Pass x through and give `loss` the gradient 1, as if it had been added to the main loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = loss.shape, loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.loss_like
        return grads[0], torch.ones(shape, dtype=dtype, device=device)


def inject_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x unchanged; in backward `loss` (0-dim) receives the gradient 1."""
    return _InjectLoss.apply(x, loss)


def count_load(expert_ids_TK: Tensor, num_experts: int, num_groups: int) -> Tensor:
    """Pairs per group and expert, (G, E) int64: G groups of equally many tokens; ids of E count nowhere."""
    ids_GP = expert_ids_TK.reshape(num_groups, -1)
    counts = torch.zeros(num_groups, num_experts + 1, dtype=torch.int64, device=ids_GP.device)
    return counts.scatter_add_(1, ids_GP, torch.ones_like(ids_GP))[:, :num_experts]


def load_balancing_loss(scores_TE: Tensor, load_GE: Tensor, tokens_G: Tensor, top_k: int) -> Tensor:
    """Sum over groups of n_g times the group's loss, where 1.0 is balanced: sum_g n_g * E * sum_e f_ge *
    P_ge.

    f_ge: share of the group's pairs that chose expert e (no gradient); P_ge: mean score of e over the group's
    n_g tokens. Fedus et al. 2021, https://arxiv.org/abs/2101.03961, per layer and divided by top-k.
    `load_GE` may be (1, E) counts of more tokens than are here (the global batch), with `tokens_G` (1,) to
    match.
    """
    num_groups, num_experts = load_GE.shape
    score_sums_GE = scores_TE.reshape(num_groups, -1, num_experts).sum(1)
    share_GE = full(load_GE) / (top_k * tokens_G.clamp(min=1)[:, None])
    return num_experts * (share_GE * score_sums_GE).sum()


def z_loss(logits_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    """Sum over tokens of logsumexp(logits)^2. Zoph et al. 2022, https://arxiv.org/abs/2202.08906."""
    squares = logits_TE.logsumexp(-1).square()
    # Not squares[valid_T]: selecting by a mask waits for the device.
    return squares.sum() if valid_T is None else squares.masked_fill(~valid_T, 0.0).sum()


def _sum_of_squares(values_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    if valid_T is not None:
        values_TE = values_TE.masked_fill(~valid_T[:, None], 0.0)
    return torch.linalg.vector_norm(values_TE).square()


class RouterPass(NamedTuple):
    """What a router did in one forward pass, without gradients; the scores of padding are 0."""

    aux_loss: Tensor
    z_loss: Tensor
    scores_TE: Tensor
    logits_TE: Tensor
    valid_T: Tensor | None


ROUTER_SUMS: dict[str, Callable[[RouterPass], Tensor]] = {
    "aux_loss": lambda seen: seen.aux_loss,
    "z_loss": lambda seen: seen.z_loss,
    "router_entropy": lambda seen: torch.special.entr(seen.scores_TE).sum(),
    "router_confidence": lambda seen: seen.scores_TE.amax(-1).sum(),
    "router_logits_mean_square": lambda seen: _sum_of_squares(seen.logits_TE, seen.valid_T) / seen.logits_TE.shape[-1],
}
"""Sums over tokens (0-dim) of a layer with scores, by name: the columns of `LoadFacts.sums`. Added up over steps and
ranks and divided by tokens, they are numbers of a layer: those of `moe_dist/monitor/metrics.py`."""


@dataclass
class LoadFacts:
    """What one layer has seen since the facts were last taken; tensors on the layer's device, never
    synchronised.

    `pairs_E` int64 (pairs routed to each expert, before any drop), `dropped_E` int64, `tokens` int64; `sums`
    float64: one for each of ROUTER_SUMS, in that order. `fallbacks` int64: tokens that went to the fallback expert.
    `pairs_NE` int64: pairs of each named source (N domains); None where they are not counted.
    """

    pairs_E: Tensor
    dropped_E: Tensor
    tokens: Tensor
    sums: Tensor
    fallbacks: Tensor
    pairs_NE: Tensor | None = None

    @staticmethod
    def zeros(num_experts: int, device: torch.device, num_domains: int = 0) -> LoadFacts:
        def count(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        # float32 on devices without float64 (Apple's); elsewhere sums over an interval keep every digit.
        wide = torch.float32 if device.type == "mps" else torch.float64
        by_domain = count(num_domains, num_experts) if num_domains else None
        sums = torch.zeros(len(ROUTER_SUMS), dtype=wide, device=device)
        return LoadFacts(count(num_experts), count(num_experts), count(), sums, count(), by_domain)

    def zero_(self) -> None:
        for tensor in (self.pairs_E, self.dropped_E, self.tokens, self.sums, self.fallbacks, self.pairs_NE):
            if tensor is not None:
                tensor.zero_()


class LoadBalance:
    """Auxiliary losses and load facts of one layer, between its router and its dispatcher.

    `layer` is its global number, by which it finds itself in a `RoutingContext`.
    """

    def __init__(self, config: BalanceConfig, num_experts: int, top_k: int, layer: int = 0) -> None:
        self.aux_coef, self.z_coef = config.aux_loss_coef, config.router_z_loss_coef
        self.scope, self.num_experts, self.top_k, self.layer = config.aux_loss_scope, num_experts, top_k, layer
        self.facts: LoadFacts | None = None

    def count_from_now_on(self, device: torch.device, num_domains: int = 0) -> None:
        """Begin to record facts, from zero, on `device`. Nothing that a layer computes depends on them."""
        self.facts = LoadFacts.zeros(self.num_experts, device, num_domains)

    def set_aux_coef(self, value: float) -> None:
        """Weigh the load-balancing loss otherwise than the configuration says, from the next pass on."""
        self.aux_coef = value

    def losses(self, routing: Routing, num_sequences: int, context: RoutingContext) -> Tensor | None:
        """The weighted auxiliary loss of this forward pass (0-dim float32), and the facts recorded on the way.

        None when the router gives no scores.
        """
        valid_T = context.valid_T
        ids_TK, scores_TE, logits_TE = routing.expert_ids_TK, routing.scores_TE, routing.logits_TE
        num_groups = num_sequences if self.scope == "sequence" else 1
        load_GE = count_load(ids_TK, self.num_experts, num_groups)
        tokens_G = self._tokens(ids_TK, valid_T, num_groups)
        self._record_domains(ids_TK, context.domain_ids_BS)
        self._record_fallbacks(routing.failed_T, valid_T)
        if scores_TE is None or logits_TE is None:
            self._record(load_GE, tokens_G, None)
            return None
        if valid_T is not None:
            scores_TE = scores_TE.masked_fill(~valid_T[:, None], 0.0)
        shares = (load_GE, tokens_G)
        if self.scope == "global_batch" and self.aux_coef and torch.is_grad_enabled():
            shares = context.global_load.get(self.layer) or self._reduced(load_GE, tokens_G, context.reduce_load)
        aux = load_balancing_loss(scores_TE, *shares, self.top_k)
        z = z_loss(logits_TE, valid_T)
        seen = RouterPass(aux.detach(), z.detach(), scores_TE.detach(), logits_TE.detach(), valid_T)
        self._record(load_GE, tokens_G, seen)
        return (self.aux_coef * aux + self.z_coef * z) * context.token_scale

    def _tokens(self, ids_TK: Tensor, valid_T: Tensor | None, num_groups: int) -> Tensor:
        if valid_T is None:
            return torch.full((num_groups,), ids_TK.shape[0] // num_groups, device=ids_TK.device)
        return valid_T.view(num_groups, -1).sum(1)

    def _reduced(self, load_GE: Tensor, tokens_G: Tensor, reduce_load: Callable[[int, Tensor], Tensor]) -> Load:
        # Ranks must meet: in a repeated pass they would not, or not in the same order.
        packed = once(lambda: reduce_load(self.layer, torch.cat((load_GE[0], tokens_G))))
        return packed[None, :-1], packed[-1:]

    def _record(self, load_GE: Tensor, tokens_G: Tensor, seen: RouterPass | None) -> None:
        if self.facts is None or is_recomputing():
            return
        self.facts.pairs_E += load_GE.sum(0)
        self.facts.tokens += tokens_G.sum()
        if seen is not None:
            self.facts.sums += torch.stack([total(seen) for total in ROUTER_SUMS.values()])

    def _record_domains(self, ids_TK: Tensor, domain_ids_BS: Tensor | None) -> None:
        if self.facts is None or self.facts.pairs_NE is None or domain_ids_BS is None or is_recomputing():
            return
        # One bin more than there are experts, for pairs that go nowhere.
        num_domains, bins = len(self.facts.pairs_NE), self.num_experts + 1
        places_TK = domain_ids_BS.flatten().long()[:, None] * bins + ids_TK
        counts = torch.zeros(num_domains * bins, dtype=torch.int64, device=ids_TK.device)
        counts.scatter_add_(0, places_TK.flatten(), torch.ones_like(places_TK).flatten())
        self.facts.pairs_NE += counts.view(num_domains, bins)[:, : self.num_experts]

    def _record_fallbacks(self, failed_T: Tensor | None, valid_T: Tensor | None) -> None:
        if self.facts is not None and failed_T is not None and not is_recomputing():
            self.facts.fallbacks += (failed_T if valid_T is None else failed_T & valid_T).sum()

    def record_dropped(self, ids_TK: Tensor, kept_TK: Tensor) -> None:
        """Count pairs that found no place: chosen experts before and after the drop."""
        if self.facts is not None and not is_recomputing():
            dropped_TK = ids_TK.masked_fill(kept_TK < self.num_experts, self.num_experts)
            self.facts.dropped_E += count_load(dropped_TK, self.num_experts, 1)[0]
