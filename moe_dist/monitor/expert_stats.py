"""Numbers about expert load, from counts already on the host. E: experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_dist.monitor.metric import metrics_of
from moe_dist.monitor.records import LayerRecord


class ExpertLoad(NamedTuple):
    """One expert and its load / fair share; 1.0: as many tokens as the layer's mean."""

    layer: int
    expert: int
    load_ratio: float


def layer_record(
    layer: int,
    pairs_E: Sequence[int] | npt.NDArray[np.int64],
    dropped: int,
    tokens: int,
    sums: Mapping[str, float],
    top_k: int,
    ep_size: int = 1,
    pairs_NE: npt.NDArray[np.int64] | None = None,
    dropped_E: npt.NDArray[np.int64] | None = None,
    fallback_tokens: int = 0,
    slots: Sequence[int] | None = None,
    copied: Sequence[int] = (),
) -> LayerRecord:
    """The record of one layer.

    `pairs_E` (E,) pairs routed to each expert before any drop; `dropped` pairs beyond capacity; `tokens`
    routed, each to `top_k` experts; `sums` over tokens, by their names in `models.auxiliary.ROUTER_SUMS`: divided
    by tokens they are fields of the record. `ep_size` ranks hold the experts, in blocks of equally many.
    `pairs_NE` (N, E): the pairs of each of N domains. `dropped_E` (E,): the dropped pairs by expert.
    `fallback_tokens` went to the fallback expert. `slots`: the experts in the order in which ranks hold them; None: in
    that of their ids. `copied` experts are computed by every rank for its own tokens, of which each has as many.
    Without tokens every ratio is 0.0 (a measured imbalance is at least 1.0) and every expert is dead.
    """
    counts = [int(count) for count in pairs_E]
    load_E = np.asarray(counts, dtype=np.float64)
    imbalance, cv, entropy = _spread(load_E)
    in_order, _, _ = _spread(load_E.reshape(ep_size, -1).sum(1))
    travels_E, order = load_E.copy(), list(range(len(load_E)) if slots is None else slots)
    travels_E[list(copied)] = 0
    stays = (load_E.sum() - travels_E.sum()) / ep_size
    rank_imbalance, _, _ = _spread(travels_E[order].reshape(ep_size, -1).sum(1) + stays)
    expert_ranks = [] if slots is None else (np.argsort(slots) * ep_size // len(slots)).tolist()
    means = {name: total / tokens if tokens else 0.0 for name, total in sums.items()}
    square = means.pop("router_logits_mean_square", 0.0)
    return LayerRecord(
        layer=int(layer),
        tokens_per_expert=counts,
        load_imbalance=imbalance,
        load_cv=cv,
        load_entropy=entropy,
        dead_experts=sum(count == 0 for count in counts),
        dropped_fraction=int(dropped) / (tokens * top_k) if tokens else 0.0,
        rank_imbalance=rank_imbalance,
        rank_imbalance_in_order=in_order,
        expert_ranks=expert_ranks,
        copied_experts=list(copied),
        domain_tokens=[] if pairs_NE is None else pairs_NE.tolist(),
        kept_per_expert=(load_E.astype(np.int64) - dropped_E).tolist() if dropped and dropped_E is not None else [],
        # Not max(0.0, NaN), which would be 0.0: a NaN must be seen.
        router_logits_rms=math.sqrt(square) if square > 0 else square,
        top_k=top_k,
        fallback_tokens=fallback_tokens,
        **means,
    )


def _spread(load_E: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """max / mean, standard deviation / mean, entropy / ln E of the loads; zeros when there is no load."""
    total = load_E.sum()
    if not total:
        return 0.0, 0.0, 0.0
    mean = load_E.mean()
    share_E = load_E[load_E > 0] / total
    # With one expert uniform and concentrated are the same thing, and ln 1 = 0 must not divide.
    entropy = -(share_E * np.log(share_E)).sum() / math.log(len(load_E)) if len(load_E) > 1 else 1.0
    # + 0.0 turns the -0.0 of a single loaded expert into 0.0.
    return float(load_E.max() / mean), float(load_E.std() / mean), float(entropy) + 0.0


def load_ratios(record: LayerRecord) -> list[float]:
    """Load of each expert / the layer's mean load; zeros when there is no load."""
    total = sum(record.tokens_per_expert)
    scale = len(record.tokens_per_expert) / total if total else 0.0
    return [count * scale for count in record.tokens_per_expert]


def used_share(record: LayerRecord) -> float:
    """Share of the experts that carry the load, exp(entropy of the loads) / E: 1.0 balanced, K / E at worst."""
    return float(len(record.tokens_per_expert) ** (record.load_entropy - 1.0))


def imbalance_seconds(layers: Sequence[LayerRecord], expert_seconds: float) -> float:
    """The imbalance tax: `expert_seconds`, those of a step that experts compute, * mean over layers of (max / mean of
    the load of ranks - 1). In every layer all ranks wait for the one with most rows.
    """
    excess = [layer.rank_imbalance - 1.0 for layer in layers if layer.rank_imbalance]
    return expert_seconds * sum(excess) / len(excess) if excess else 0.0


def extremes(layers: Sequence[LayerRecord]) -> tuple[ExpertLoad, ExpertLoad] | None:
    """The hottest and the coldest expert over all layers, by load ratio; None when nothing was routed.

    Equal ratios: the lowest layer, then the lowest expert.
    """
    loads = [
        ExpertLoad(record.layer, expert, ratio)
        for record in layers
        if any(record.tokens_per_expert)
        for expert, ratio in enumerate(load_ratios(record))
    ]
    if not loads:
        return None
    return max(loads, key=lambda load: load.load_ratio), min(loads, key=lambda load: load.load_ratio)


def overall(layers: Sequence[LayerRecord]) -> dict[str, float]:
    """Each number over all layers, as its metric reduces it; empty without layers."""
    metrics = metrics_of(LayerRecord).values() if layers else ()
    return {
        metric.name: metric.reduce([getattr(layer, metric.name) for layer in layers])
        for metric in metrics
        if metric.reduce is not None
    }
