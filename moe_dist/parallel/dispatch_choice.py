"""Which dispatcher `parallel.dispatcher: auto` is, from the layout alone. Imports no torch."""

from __future__ import annotations

from importlib.util import find_spec

from moe_dist.config import Config, ConfigError

LEAST_SAVED = 0.1
"""Part of the rows that `dedup` must save for what it does besides."""
LEAST_SAVED_BETWEEN_HOSTS = 0.25
"""Part of the rows between hosts that `hierarchical` must save for its second exchange inside them."""


def require_installed(dispatcher: str) -> None:
    """Raises ConfigError where a dispatcher is the work of a package that is not installed."""
    if dispatcher == "deepep" and find_spec("deep_ep") is None:
        raise ConfigError(
            "parallel.dispatcher=deepep: the package deep_ep is not installed; it is built from the source of DeepEP, "
            "for GPUs with NVLink; or take parallel.dispatcher=auto"
        )


def rows_per_token(top_k: int, ep_size: int) -> tuple[float, float]:
    """Rows of one token that leave its rank, one way, with balanced routing: one for each pair, and one for each rank.

    A rank has none of a token's K experts with probability (1 - 1/ep)^K, taking them as drawn one by one.
    """
    away = 1 - 1 / ep_size
    return top_k * away, (ep_size - 1) * (1 - away**top_k)


def rows_between_hosts(top_k: int, ep_size: int, ranks_per_host: int) -> tuple[float, float]:
    """Rows of one token that leave its host: one for each rank, and one for each host."""
    hosts = ep_size // ranks_per_host
    once_each_rank = (ep_size - ranks_per_host) * (1 - (1 - 1 / ep_size) ** top_k)
    return once_each_rank, (hosts - 1) * (1 - (1 - 1 / hosts) ** top_k)


def ranks_on_a_host(config: Config, started_here: int | None) -> int | None:
    """Ranks of an expert group on each host, where it is on several and has several on each; else None.
    `started_here`: ranks of this machine, None where that is not known."""
    there, ep_size = config.parallel.ranks_per_host or started_here, config.parallel.ep_size
    return there if there is not None and 1 < there < ep_size and ep_size % there == 0 else None


def hosts_for(config: Config, started_here: int | None) -> int | None:
    """Ranks of an expert group on each host, where the dispatcher wants groups of them."""
    is_wanted = chosen_dispatcher(config, started_here)[0] == "hierarchical"
    return ranks_on_a_host(config, started_here) if is_wanted else None


def chosen_dispatcher(config: Config, started_here: int | None = None) -> tuple[str, str]:
    """The dispatcher's name, and why where that was not the configuration's word, else "". `started_here`: as of
    `ranks_on_a_host`."""
    name, top_k, ep_size = config.parallel.dispatcher, config.model.num_experts_per_tok, config.parallel.ep_size
    there = ranks_on_a_host(config, started_here)
    if name == "hierarchical" and there is None and ep_size > 1:
        return "dedup", "hierarchical: an expert group is not on several hosts with several ranks each"
    if name != "auto":
        return name, ""
    if ep_size == 1 or not config.model.moe_layers:
        return "all_to_all", ""
    if there is not None:
        ranks, hosts = rows_between_hosts(top_k, ep_size, there)
        saves = 1 - hosts / ranks
        if saves >= LEAST_SAVED_BETWEEN_HOSTS:
            why = f"{hosts:.2f} instead of {ranks:.2f} rows of a token leave its host, {saves:.0%} fewer"
            return "hierarchical", why
    pairs, once = rows_per_token(top_k, ep_size)
    saves = 1 - once / pairs
    if saves < LEAST_SAVED:
        return "all_to_all", f"dedup would spare {saves:.0%} of the rows that leave a rank"
    return "dedup", f"{once:.2f} instead of {pairs:.2f} rows of a token leave its rank, {saves:.0%} fewer"
