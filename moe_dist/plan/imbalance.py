"""How uneven experts load ranks: one number, measured by a run (`load_imbalance` in its log) or assumed."""

from __future__ import annotations

from moe_dist.config import Config

ASSUMED = 1.25
"""Rows of the busiest expert of a layer as multiples of the mean, in a run that is balanced well."""


def rank_load(config: Config, ep_size: int, imbalance: float) -> float:
    """Rows on the busiest rank as multiples of the mean. The loads of the experts of a rank even out as independent
    numbers do; with all experts on every rank nothing is uneven. With fixed places all of them are computed."""
    model = config.model
    if config.parallel.dispatcher == "static" and config.balance.capacity_factor is not None and model.moe_layers:
        return config.balance.capacity_factor
    if ep_size == 1 or not model.moe_layers:
        return 1.0
    return 1.0 + (imbalance - 1.0) / (model.num_experts / ep_size) ** 0.5
