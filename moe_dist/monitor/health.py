"""Findings, and those about routing: dead experts, collapse, saturation, imbalance; each said once, with the key
that helps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moe_dist.monitor.expert_stats import used_share
from moe_dist.monitor.records import LayerRecord

PATIENCE = 3
"""Logging intervals in a row before anything is said: early in training every router is unbalanced."""
LONG_PATIENCE = 10
"""The same for what training may mend by itself."""
ENOUGH = 32
"""Tokens that an expert must have missed by its fair share before it counts as without tokens: of a balanced layer it
would miss so many by chance once in 10^14 intervals, however short these are."""
COLLAPSE = 0.5
"""A layer has collapsed when fewer than this share of its experts carry its load (exp(entropy) / E)."""
SATURATED = 0.02
"""A router is saturated when the entropy of its scores is below this share of ln E: its gradient is as good as zero."""
IMBALANCED = 3.0
"""Load of the busiest expert / fair share."""
PATIENCE_OF = {"dead_experts": PATIENCE, "collapse": PATIENCE, "imbalance": LONG_PATIENCE}
"""Intervals after which each trouble of a layer's balance is a finding."""
_REMEDY = "raise balance.router_aux_loss_coef, or set balance.bias_update_rate (1e-3)"


@dataclass(frozen=True)
class Finding:
    """Something a person should know about a run. `str()` is the line for people."""

    kind: str
    """`dead_experts`, `loss_spike`, ...: docs/metrics.md lists all."""
    severity: Literal["info", "warning", "critical"]
    words: str
    """The sentence, with what to do about it."""
    key: str = ""
    """Configuration key to change; empty when there is none."""
    step: int | None = None
    """When it was found."""
    layer: int | None = None
    experts: tuple[int, ...] = ()
    rank: int | None = None
    evidence: dict[str, float] = field(default_factory=dict)
    """The numbers behind it."""

    def __str__(self) -> str:
        return self.words if self.step is None else f"step {self.step}: {self.words}"

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)


class Lasting:
    """Counts in how many intervals in a row a condition has been there."""

    def __init__(self) -> None:
        self._count: dict[object, int] = {}

    def reaches(self, condition: object, present: bool, patience: int) -> bool:
        """Whether it reaches its patience in this very interval; again only after it has gone."""
        count = self._count.get(condition, 0) + 1 if present else 0
        self._count[condition] = count
        return count == patience


@dataclass
class Absence:
    """Experts of one layer without tokens: two counts for each expert, of the intervals in a row without one."""

    intervals: list[int] = field(default_factory=list)
    """How many."""
    missed: list[int] = field(default_factory=list)
    """The (token, expert) pairs of the whole layer in them."""

    def observe(self, load: Sequence[int]) -> dict[int, int]:
        """An interval, with the pairs of each expert: for those that are absent, and not by chance, how many intervals.

        Integers only: the same in every layout.
        """
        total, none = sum(load), [0] * len(load)
        counts = zip(load, self.intervals or none, self.missed or none, strict=True)
        absent = [(0, 0) if tokens else (count + 1, missed + total) for tokens, count, missed in counts]
        self.intervals, self.missed = [count for count, _ in absent], [missed for _, missed in absent]
        return {expert: count for expert, (count, missed) in enumerate(absent) if missed >= ENOUGH * len(load)}


class Health:
    """Watches every interval's layers. A condition is told when it has lasted, and again only after it has gone; dead
    experts are told when there is a new one among them.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience = patience
        self._lasting = Lasting()
        self._absence: dict[int, Absence] = defaultdict(Absence)
        self._dead: dict[int, set[int]] = defaultdict(set)

    def observe(self, layers: Sequence[LayerRecord], step: int | None = None) -> list[Finding]:
        """What has now lasted `patience` intervals."""
        return [finding for record in layers if sum(record.tokens_per_expert) for finding in self._of(record, step)]

    def _of(self, record: LayerRecord, step: int | None) -> list[Finding]:
        found = []
        layer, load = record.layer, record.tokens_per_expert
        present = conditions(record)
        absent = self._absence[layer].observe(load)
        dead = [expert for expert, intervals in absent.items() if intervals >= self.patience]
        known, self._dead[layer] = self._dead[layer], set(dead)
        if not known.issuperset(dead):
            names = ", ".join(map(str, dead[:8])) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
            found.append(
                Finding(
                    "dead_experts",
                    "warning",
                    f"layer {layer}: {len(dead)} of {len(load)} experts get no tokens ({names}); {_REMEDY}",
                    "balance.router_aux_loss_coef",
                    step,
                    layer,
                    tuple(dead),
                    evidence={"dead_experts": len(dead)},
                )
            )
        if self._lasting.reaches(("collapse", layer), present["collapse"], self.patience):
            busiest = sorted(range(len(load)), key=lambda expert: -load[expert])[:2]
            share = sum(load[expert] for expert in busiest) / sum(load)
            found.append(
                Finding(
                    "collapse",
                    "critical",
                    f"layer {layer}: the router has collapsed, its two busiest experts take "
                    f"{100 * share:.0f} % of the load; {_REMEDY}",
                    "balance.router_aux_loss_coef",
                    step,
                    layer,
                    tuple(busiest),
                    evidence={"used_share": used_share(record), "share_of_two": share},
                )
            )
        if self._lasting.reaches(("imbalance", layer), present["imbalance"], LONG_PATIENCE):
            busiest = [load.index(max(load))]
            found.append(
                Finding(
                    "imbalance",
                    "warning",
                    f"layer {layer}: expert {busiest[0]} has {record.load_imbalance:.1f} times its fair share, and "
                    f"every rank waits for it; {_REMEDY}",
                    "balance.router_aux_loss_coef",
                    step,
                    layer,
                    tuple(busiest),
                    evidence={"load_imbalance": record.load_imbalance},
                )
            )
        if self._lasting.reaches(("saturated", layer), is_saturated(record), self.patience):
            found.append(
                Finding(
                    "router_saturated",
                    "warning",
                    f"layer {layer}: the router is certain of every token (entropy {record.router_entropy:.4f} nats of "
                    f"{math.log(len(load)):.2f}, logits of {record.router_logits_rms:.1f}) and hardly learns any more; "
                    "set balance.router_z_loss_coef (1e-3)",
                    "balance.router_z_loss_coef",
                    step,
                    layer,
                    evidence={
                        "router_entropy": record.router_entropy,
                        "router_confidence": record.router_confidence,
                        "router_logits_rms": record.router_logits_rms,
                    },
                )
            )
        return found


def conditions(record: LayerRecord) -> dict[str, bool]:
    """What is wrong with a layer's balance in this very interval, besides experts that are absent; an imbalance that is
    a collapse counts as that.
    """
    collapsed = used_share(record) < COLLAPSE
    return {
        "collapse": collapsed,
        "imbalance": record.load_imbalance > IMBALANCED and not collapsed,
    }


def is_saturated(record: LayerRecord) -> bool:
    """Whether scores are all but one-hot. A router without scores has entropy and confidence 0: not saturated."""
    num_experts = len(record.tokens_per_expert)
    limit = SATURATED * math.log(num_experts) if num_experts > 1 else 0.0
    return record.router_confidence > 0.5 and record.router_entropy < limit
