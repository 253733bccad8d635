"""Which experts does a token go to, and how much does each count?

Shape suffixes: T tokens, D hidden, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.config.sections.model import EXPERT_CHOICE
from moe_dist.models.layers import LowRank
from moe_dist.models.permute import count_ids
from moe_dist.models.precision import full, full_dtype
from moe_dist.models.recompute import once
from moe_dist.models.registry import Registry
from moe_dist.versions import tensors_inside


@tensors_inside
@dataclass(frozen=True)
class Routing:
    """What a router decided for T tokens.

    `weights_TK` float32, differentiable; `expert_ids_TK` int64 in [0, E), or E itself for a (token, expert)
    pair that must not be computed (padding, no place left). `scores_TE` float32: how the router would share
    each token over all experts, rows sum to 1 (for the load-balancing loss). `logits_TE` float32 (for the
    z-loss). A router of your own may leave the last two None; it then has no auxiliary losses.
    """

    weights_TK: Tensor
    expert_ids_TK: Tensor
    scores_TE: Tensor | None = None
    logits_TE: Tensor | None = None
    complete: bool = False
    """Known without looking at the ids: every one is below E. Saves a host synchronisation."""
    failed_T: Tensor | None = None
    """Bool: tokens whose logits were not finite, and that go to the fallback expert; None where there is none."""
    noise_seed: int | None = None
    """Of what experts draw at random for these tokens, below 2^62; None where they draw nothing."""

    @staticmethod
    def of(decision: Routing | tuple[Tensor, Tensor]) -> Routing:
        """A router's answer as a Routing: itself, or expert ids and weights (T, K) in either order."""
        if isinstance(decision, Routing):
            return decision
        first, second = decision
        weights, ids = (first, second) if first.is_floating_point() else (second, first)
        if weights.shape != ids.shape or ids.is_floating_point() or not weights.is_floating_point():
            raise ValueError(
                f"a router's tuple must be expert ids (T, K) integer and weights (T, K) float, not "
                f"{tuple(first.shape)} {first.dtype} and {tuple(second.shape)} {second.dtype}"
            )
        return Routing(weights, ids.long())


class TopK(NamedTuple):
    """Chosen experts (..., K) int64 and their weights (..., K) float32."""

    indices: Tensor
    weights: Tensor


class TopKRouter(nn.Module):
    """The selection rule, without weights of its own: logits (..., E) -> TopK of (..., K).

    `scoring_func` softmax over experts or a sigmoid per expert. `norm_topk_prob` divides the K weights by
    their sum. `bias` (E,) moves the choice but never the weights (auxiliary-loss-free balancing, Wang et al.
    2024, https://arxiv.org/abs/2408.15664). With `n_group` > 1 only the `topk_group` groups whose two best
    experts score highest are eligible (DeepSeek-V3, https://arxiv.org/abs/2412.19437).
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        scoring_func: str = "softmax",
        norm_topk_prob: bool = True,
        n_group: int = 1,
        topk_group: int = 1,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k}: between 1 and num_experts={num_experts}")
        self.num_experts, self.top_k, self.scoring_func = num_experts, top_k, scoring_func
        self.norm_topk_prob, self.scaling_factor = norm_topk_prob, scaling_factor
        self.n_group, self.topk_group = n_group, topk_group

    def log_scores(self, logits: Tensor) -> Tensor:
        """Log of the score of each expert, (..., E) float32. Logs stay exact where sigmoids underflow."""
        logits = full(logits)
        return F.log_softmax(logits, dim=-1) if self.scoring_func == "softmax" else F.logsigmoid(logits)

    def forward(self, logits: Tensor, bias: Tensor | None = None) -> TopK:
        return self.pick(self.log_scores(logits), bias)

    def pick(self, log_scores: Tensor, bias: Tensor | None = None) -> TopK:
        """As `forward`, from log scores (..., E)."""
        indices = self.choose(log_scores.detach(), bias)
        chosen = log_scores.gather(-1, indices)
        # A softmax of logs is the division by the sum, without an epsilon that underflowing scores could hide
        # in.
        weights = chosen.softmax(-1) if self.norm_topk_prob else chosen.exp()
        return TopK(indices, weights * self.scaling_factor)

    def choose(self, log_scores: Tensor, bias: Tensor | None) -> Tensor:
        """Expert ids (..., K) with the highest scores; equal scores go to any of them, the same each time."""
        ranking = log_scores if bias is None and self.n_group == 1 else log_scores.exp()
        if bias is not None:
            ranking = ranking + bias
        if self.n_group > 1:
            grouped = ranking.unflatten(-1, (self.n_group, -1))
            group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            groups = group_scores.topk(self.topk_group, dim=-1).indices
            allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, groups, True)
            ranking = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
        return ranking.topk(self.top_k, dim=-1).indices


class Router(nn.Module):
    """A linear map to one logit per expert, then the selection rule; float32 whatever the model's dtype.

    Subclass to route in your own way: override `logits` (T, D) -> (T, E), or `forward` (T, D) -> `Routing` (a
    plain tuple of ids and weights (T, K) will do); `select_experts` applies the configured rule. A subclass that
    has no use for `weight` calls `super().__init__()` without sizes, or sets it to None; one with parameters of its own
    gives a `reset_parameters` method.
    `bias_E` is the selection bias that auxiliary-loss-free balancing moves; it is state, not a parameter. `use_bias`:
    whether it is added to the scores for the choice; None: where it is not zero. `logits_temperature` divides logits;
    `fallback_expert`: where tokens go whose logits are NaN or infinite; None: nowhere else than others.
    """

    takes_valid = False
    """Whether `forward` also takes (T,) bool: which tokens are no padding; None for all."""
    bias_E: Tensor
    use_bias: bool | None
    weight: nn.Parameter
    """None where there are no sizes."""
    logits_bias_E: nn.Parameter | None
    rule: TopKRouter

    def __init__(self, hidden_size: int | None = None, num_experts: int | None = None, top_k: int = 2) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.register_parameter("logits_bias_E", None)
        self.lora: LowRank | None = None
        self.use_bias, self.jitter, self.logits_temperature = None, 0.0, 1.0
        self.fallback_expert: int | None = None
        self._bias_seen: tuple[tuple[int, int], bool] | None = None
        self._top_k = top_k
        self._set_sizes(hidden_size, num_experts)
        if hidden_size is not None and num_experts is not None:
            self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
            if not self.weight.is_meta:  # there is nothing to draw, and torch would load its compiler to do so
                nn.init.normal_(self.weight, std=0.02)

    def _set_sizes(self, hidden_size: int | None, num_experts: int | None) -> None:
        """Rule and selection bias for so many experts; None: not known yet, `build_router` says it."""
        self.hidden_size, self.num_experts = hidden_size, num_experts
        if num_experts is not None:
            self.rule = TopKRouter(num_experts, min(self._top_k, num_experts))
        self.register_buffer("bias_E", torch.zeros(num_experts or 0, dtype=full_dtype()))

    @property
    def top_k(self) -> int:
        return self.rule.top_k

    @property
    def selection_bias(self) -> Tensor | None:
        """The bias (E,) to choose by; None where there is none, which is cheaper than zeros."""
        use = self.use_bias
        if use is None:
            # Looking waits for the device: once, and again when a checkpoint has been read into it.
            state = self.bias_E.data_ptr(), self.bias_E._version
            if self._bias_seen is None or self._bias_seen[0] != state:
                self._bias_seen = state, bool(self.bias_E.any())
            use = self._bias_seen[1]
        return self.bias_E if use else None

    def settle_bias(self) -> None:
        """Decide by its values of today whether the bias is added, for who cannot look at values later."""
        self.use_bias = self.selection_bias is not None

    def set_temperature(self, temperature: float) -> None:
        """Divide logits by it from the next pass on, as the schedule of `balance.router_temperature` says."""
        self.logits_temperature = temperature

    def logits(self, x_TD: Tensor) -> Tensor:
        """One logit per expert: (T, D) -> (T, E)."""
        if self.weight is None:
            raise ValueError(
                f"model.router: {type(self).__name__} has no weight: give super().__init__ its sizes, "
                "or override logits or forward"
            )
        logits_TE = F.linear(x_TD, full(self.weight), None if self.logits_bias_E is None else full(self.logits_bias_E))
        return logits_TE if self.lora is None else logits_TE + self.lora(x_TD)

    def add_logits_bias(self) -> None:
        """Give the linear map a bias, zeros, as `model.router_bias` asks."""
        assert self.num_experts is not None
        self.logits_bias_E = nn.Parameter(torch.zeros(self.num_experts))

    def forward(self, x_TD: Tensor) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE, failed_T = self._finite(self._prepared(x_TD))
            log_scores_TE = self.rule.log_scores(logits_TE)
            expert_ids_TK, weights_TK = self.rule.pick(log_scores_TE, self.selection_bias)
            if failed_T is not None:
                expert_ids_TK, weights_TK = self._fall_back(failed_T, expert_ids_TK, weights_TK)
            scores_TE = log_scores_TE.softmax(-1)
            return Routing(
                weights_TK, expert_ids_TK, scores_TE, logits_TE, complete=failed_T is None, failed_T=failed_T
            )

    def _prepared(self, x_TD: Tensor) -> Tensor:
        """What the gate sees: full precision, with noise in training."""
        x_TD = full(x_TD)
        if self.jitter and self.training:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        return x_TD

    def _tempered(self, x_TD: Tensor) -> Tensor:
        logits_TE = full(self.logits(x_TD))
        return logits_TE if self.logits_temperature == 1.0 else logits_TE / self.logits_temperature

    def _finite(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (T, E), and which tokens' are not finite: with a fallback expert, these are zeros without gradient.

        Some experts at -inf are no failure: a router may shut them out.
        """
        if self.fallback_expert is None:
            return self._tempered(x_TD), None
        x_TD = x_TD.view_as(x_TD)  # of its own, so that the hook sees the gate's gradient alone
        logits_TE = self._tempered(x_TD)
        failed_T = once(lambda: ~logits_TE.detach().logsumexp(-1).isfinite())
        if x_TD.requires_grad:  # zero times a weight that is NaN is NaN
            x_TD.register_hook(lambda grad_TD: grad_TD.masked_fill(failed_T[:, None], 0.0))
        return logits_TE.masked_fill(failed_T[:, None], 0.0), failed_T

    def _fall_back(self, failed_T: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights, those of tokens that failed replaced by the fallback expert alone."""
        assert self.fallback_expert is not None
        num_others = expert_ids_TK.shape[1] - 1
        ids_K = expert_ids_TK.new_tensor([self.fallback_expert] + [self.num_experts] * num_others)
        weights_K = weights_TK.new_tensor([self.rule.scaling_factor] + [0.0] * num_others)
        failed_T1 = failed_T[:, None]
        return torch.where(failed_T1, ids_K, expert_ids_TK), torch.where(failed_T1, weights_K, weights_TK)

    def select_experts(self, probabilities: Tensor) -> TopK:
        """The K best experts of (..., E) probabilities, and their weights, by the configured rule."""
        if not hasattr(self, "rule"):  # alone, not in a model
            self._set_sizes(self.hidden_size, probabilities.shape[-1])
        indices = self.rule.choose(full(probabilities.detach()).log(), None)
        weights = full(probabilities.gather(-1, indices))
        if self.rule.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return TopK(indices, weights * self.rule.scaling_factor)


_STEPS_OF_LOGARITHM = 2**16
"""Scores that differ by less than one part in so many are equal to an expert that chooses."""


class ExpertChoiceRouter(Router):
    """Each expert takes the tokens that score highest for it (Zhou et al. 2022, https://arxiv.org/abs/2202.09368).

    Of n tokens an expert takes k = ceil(n * top_k / E), so that a token has top_k experts on average, and none or all E
    of them at the extremes. Weights are the softmax scores. **Not causal**: whether a token gets an expert depends on
    the other tokens of its micro-batch, later ones too.
    """

    takes_valid = True

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self._tempered(self._prepared(x_TD))
            log_scores_TE = self.rule.log_scores(logits_TE)
            expert_ids_TE = self._take(log_scores_TE.detach(), valid_T)
            scores_TE = log_scores_TE.exp()
            return Routing(scores_TE * self.rule.scaling_factor, expert_ids_TE, scores_TE, logits_TE)

    def _take(self, log_scores_TE: Tensor, valid_T: Tensor | None) -> Tensor:
        """Column e of the answer (T, E) is e where expert e takes the token, else E."""
        num_tokens, num_experts = log_scores_TE.shape
        # Like tokens at the start of documents are equal but for rounding, and rounding depends on the layout: equal
        # for the choice too, of which the first is taken.
        rank_by_TE = (log_scores_TE * _STEPS_OF_LOGARITHM).round()
        available = rank_by_TE.new_tensor(num_tokens, dtype=torch.int64)
        if valid_T is not None:
            rank_by_TE, available = rank_by_TE.masked_fill(~valid_T[:, None], float("-inf")), valid_T.sum()
        places = (available * self.top_k + num_experts - 1) // num_experts
        order_TE = rank_by_TE.sort(dim=0, descending=True, stable=True).indices
        ranks = torch.arange(num_tokens, device=rank_by_TE.device)[:, None].expand_as(order_TE)
        rank_TE = torch.empty_like(order_TE).scatter_(0, order_TE, ranks)
        ids_E = torch.arange(num_experts, device=rank_by_TE.device)
        return torch.where(rank_TE < places, ids_E, num_experts)


ROUTERS: Registry[Callable[..., Router]] = Registry("model.router", "router")
ROUTERS.register("topk")(Router)
ROUTERS.register(EXPERT_CHOICE)(ExpertChoiceRouter)
register_router = ROUTERS.register


def build_router(config: ModelConfig, balance: BalanceConfig) -> Router:
    """The configured router, with the selection rule of the configuration."""
    router = ROUTERS.resolve(config.router)(config.hidden_size, config.num_experts)
    if not hasattr(router, "rule"):
        router._set_sizes(config.hidden_size, config.num_experts)
    if config.router_bias:
        router.add_logits_bias()
    router.rule = TopKRouter(
        config.num_experts,
        config.num_experts_per_tok,
        scoring_func=config.scoring_func,
        norm_topk_prob=config.norm_topk_prob,
        n_group=config.n_group,
        topk_group=config.topk_group,
        scaling_factor=config.routed_scaling_factor,
    )
    router.use_bias, router.jitter = balance.use_bias, balance.router_jitter
    router.logits_temperature, router.fallback_expert = balance.router_temperature, balance.fallback_expert
    if balance.router_temperature != 1.0 or balance.fallback_expert is not None:
        _check_forward(router, config.router)
    if balance.freeze_router:
        router.requires_grad_(False)
    return router


def _check_forward(router: Router, name: str) -> None:
    """Raises ValueError for a router that has no use for logits_temperature and fallback_expert."""
    if type(router).forward not in (Router.forward, ExpertChoiceRouter.forward):
        keys = "balance.router_temperature and balance.fallback_expert"
        raise ValueError(f"model.router={name}: it overrides forward, where {keys} have no effect; override logits")


def drop_over_capacity(expert_ids_TK: Tensor, num_experts: int, capacity: Tensor) -> Tensor:
    """First come, first served: ids with every pair past `capacity` (0-dim) of its expert replaced by
    num_experts.

    Tokens come in order, a token's first choice before its second. Ids equal to num_experts take no place.
    """
    flat = expert_ids_TK.flatten()
    sorted_ids, order = flat.sort(stable=True)
    counts = count_ids(flat, num_experts + 1)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(flat)
    place[order] = torch.arange(flat.numel(), device=flat.device) - first[sorted_ids]
    return flat.masked_fill(place >= capacity, num_experts).view_as(expert_ids_TK)
