"""What a router decides for tokens, the rule by which it chooses, and what a full expert makes of it.

Shape suffixes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.models.permute import earlier_equals
from moe_dist.models.precision import full
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
    places: int | None = None
    """Known without looking at the ids: no expert has more pairs. None where that is not known, or not enough: where
    experts draw noise, how many rows they have must be told."""

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


def drop_over_capacity(expert_ids_TK: Tensor, num_experts: int, capacity: Tensor | int) -> Tensor:
    """First come, first served: ids with every pair past `capacity` (a tensor: 0-dim) of its expert replaced by
    num_experts.

    Tokens come in order, a token's first choice before its second. Ids equal to num_experts take no place.
    """
    flat = expert_ids_TK.flatten()
    return flat.masked_fill(earlier_equals(flat, num_experts) >= capacity, num_experts).view_as(expert_ids_TK)
