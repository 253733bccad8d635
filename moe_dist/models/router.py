"""Which experts does a token go to, and how much does each count?

Shape suffixes: T tokens, D hidden, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.config.sections.model import EXPERT_CHOICE
from moe_dist.models.layers import LowRank
from moe_dist.models.precision import full, full_dtype
from moe_dist.models.recompute import once
from moe_dist.models.registry import Registry
from moe_dist.models.routing import Routing as Routing
from moe_dist.models.routing import TopK as TopK
from moe_dist.models.routing import TopKRouter as TopKRouter


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
        # Not from lists of numbers: a GPU would have to wait for them.
        ids_K = F.pad(expert_ids_TK.new_full((1,), self.fallback_expert), (0, num_others), value=self.num_experts)
        weights_K = F.pad(weights_TK.new_full((1,), self.rule.scaling_factor), (0, num_others))
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
