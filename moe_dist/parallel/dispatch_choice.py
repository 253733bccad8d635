"""Which dispatcher `parallel.dispatcher: auto` is, from the layout alone. Imports no torch."""

from __future__ import annotations

from moe_dist.config import Config

LEAST_SAVED = 0.1
"""Part of the rows that `dedup` must save for what it does besides."""


def rows_per_token(top_k: int, ep_size: int) -> tuple[float, float]:
    """Rows of one token that leave its rank, one way, with balanced routing: one for each pair, and one for each rank.

    A rank has none of a token's K experts with probability (1 - 1/ep)^K, taking them as drawn one by one.
    """
    away = 1 - 1 / ep_size
    return top_k * away, (ep_size - 1) * (1 - away**top_k)


def chosen_dispatcher(config: Config) -> tuple[str, str]:
    """The dispatcher's name, and why where `auto` has chosen it, else ""."""
    name, top_k, ep_size = config.parallel.dispatcher, config.model.num_experts_per_tok, config.parallel.ep_size
    if name != "auto":
        return name, ""
    if ep_size == 1 or not config.model.moe_layers:
        return "all_to_all", ""
    pairs, once = rows_per_token(top_k, ep_size)
    saves = 1 - once / pairs
    if saves < LEAST_SAVED:
        return "all_to_all", f"dedup would spare {saves:.0%} of the rows that leave a rank"
    return "dedup", f"{once:.2f} instead of {pairs:.2f} rows of a token leave its rank, {saves:.0%} fewer"
