"""Routing that has gone wrong, said once, with the key that helps: dead experts and router collapse."""

from __future__ import annotations

from collections.abc import Sequence

from moe_dist.monitor.expert_stats import used_share
from moe_dist.monitor.records import LayerRecord

PATIENCE = 3
"""Logging intervals in a row before anything is said: early in training every router is unbalanced."""
COLLAPSE = 0.5
"""A layer has collapsed when fewer than this share of its experts carry its load (exp(entropy) / E)."""
_REMEDY = "raise balance.router_aux_loss_coef, or set balance.bias_update_rate (1e-3)"


class Health:
    """Watches every interval's layers. A condition is told when it has lasted, and again only after it has gone."""

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience = patience
        self._lasting: dict[tuple[str, int], int] = {}

    def observe(self, layers: Sequence[LayerRecord]) -> list[str]:
        """Sentences about conditions that have now lasted `patience` intervals."""
        said = []
        for record in layers:
            load = record.tokens_per_expert
            if not sum(load):
                continue
            dead = [expert for expert, tokens in enumerate(load) if tokens == 0]
            if self._lasts("dead", record.layer, bool(dead)):
                names = ", ".join(map(str, dead[:8])) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
                said.append(
                    f"layer {record.layer}: {len(dead)} of {len(load)} experts get no tokens ({names}); {_REMEDY}"
                )
            if self._lasts("collapse", record.layer, used_share(record) < COLLAPSE):
                shares = sorted((tokens / sum(load) for tokens in load), reverse=True)
                said.append(
                    f"layer {record.layer}: the router has collapsed, its two busiest experts take "
                    f"{100 * sum(shares[:2]):.0f} % of the load; {_REMEDY}"
                )
        return said

    def _lasts(self, condition: str, layer: int, present: bool) -> bool:
        """Whether a condition reaches its patience in this very interval."""
        count = self._lasting.get((condition, layer), 0) + 1 if present else 0
        self._lasting[condition, layer] = count
        return count == self.patience
