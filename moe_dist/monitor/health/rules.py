"""Findings, how long they last, and those about routing: dead experts, collapse, saturation, imbalance, fallback."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from moe_dist.monitor.expert_stats import used_share
from moe_dist.monitor.health.advice import Advice
from moe_dist.monitor.records import LayerRecord

PATIENCE = 3
"""Logging intervals in a row before anything is said: early in training every router is unbalanced."""
LONG_PATIENCE = 10
"""The same for what training may mend by itself."""
STEPS = 20
"""Optimizer steps that a trouble of routing lasts before it is said, however short the intervals are."""
ENOUGH = 32
"""Tokens that an expert must have missed by its fair share before it counts as without tokens: of a balanced layer it
would miss so many by chance once in 10^14 intervals, however short these are."""
SATURATED = 0.02
"""A router is saturated when the entropy of its scores is below this share of ln E: its gradient is as good as zero."""
IMBALANCED = 3.0
"""Load of the busiest expert / fair share, where E / K is from 5 to 9; see `imbalance_limit`."""
NOISE = 4.0
"""Standard deviations of counting that a load may exceed its limit by."""
EVEN_CV, UNEVEN_CV = 0.2, 0.25
"""Coefficient of variation that is worth a line; share of the worst one, sqrt(E / K - 1), that is a warning."""
SETTLED = 100
"""Steps, or those of the warm-up if they are more, before an uneven load is a finding."""
MOST_PAST = 1000
"""Findings that are over which are remembered, the last ones."""
PATIENCE_OF = {"dead_experts": PATIENCE, "collapse": PATIENCE, "imbalance": LONG_PATIENCE}
"""Intervals after which each trouble of a layer's balance is a finding."""


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
    until: int | None = None
    """Step at which it was over; None: it is still so, or it is an event."""

    def __str__(self) -> str:
        return self.words if self.step is None else f"step {self.step}: {self.words}"

    def over(self, step: int | None) -> Finding:
        """The same as history: information, without what there was to do."""
        return replace(self, severity="info", words=self.words.partition(";")[0], until=step)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)


@dataclass
class _Streak:
    there: int = 0
    """Intervals in a row with the condition."""
    gone: int = 0
    """Intervals in a row without it."""


class Conditions:
    """What is so now, and what has been: a condition becomes a finding when it has lasted, and is over when it has been
    away for as long (a single good interval in a bad time ends nothing).
    """

    def __init__(self, past: deque[Finding] | None = None) -> None:
        """`past`: where what is over goes, shared with others; it holds the last MOST_PAST."""
        self.present: dict[object, Finding] = {}
        self.past: deque[Finding] = deque(maxlen=MOST_PAST) if past is None else past
        self._streaks: dict[object, _Streak] = defaultdict(_Streak)

    def observe(
        self, key: object, is_so: bool, patience: int, step: int | None, make: Callable[[], Finding]
    ) -> list[Finding]:
        """An interval: the finding, if it becomes one now."""
        streak = self._streaks[key]
        streak.there, streak.gone = (streak.there + 1, 0) if is_so else (0, streak.gone + 1)
        if key in self.present:
            if streak.gone >= patience:
                self.end(key, step)
            return []
        if streak.there < patience:
            return []
        return [self.begin(key, make())]

    def begin(self, key: object, finding: Finding) -> Finding:
        """It is so from now on, in these words."""
        self.present[key] = finding
        return finding

    def end(self, key: object, step: int | None) -> None:
        """It is over, if it was so."""
        finding = self.present.pop(key, None)
        if finding is not None:
            self.past.append(finding.over(step))

    def end_all(self, step: int | None) -> None:
        """Everything is over, and what was about to be found is forgotten."""
        for key in list(self.present):
            self.end(key, step)
        self._streaks.clear()


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
    """Watches every interval's layers. A condition is reported when it has lasted, and again only after it has gone;
    dead experts are reported when there is a new one among them.
    """

    def __init__(self, patience: int = PATIENCE, conditions: Conditions | None = None) -> None:
        self.patience, self.advice = patience, Advice()
        self.conditions = Conditions() if conditions is None else conditions
        self._absence: dict[int, Absence] = defaultdict(Absence)
        self._dead: dict[int, set[int]] = defaultdict(set)
        self._step: int | None = None
        self._without_fallback = 0

    def observe(
        self, layers: Sequence[LayerRecord], step: int | None = None, max_steps: int | None = None
    ) -> list[Finding]:
        """What has now lasted `patience` intervals, and STEPS steps where these are reported."""
        length = step - self._step if step is not None and self._step is not None else STEPS
        self._step = step
        at_least = math.ceil(STEPS / max(1, length))
        routed = [record for record in layers if sum(record.tokens_per_expert)]
        found = [finding for record in routed for finding in self._of(record, step, at_least)]
        if routed:
            found += self._fallbacks(routed, step)
        if routed and step is not None:
            found += self._unevenness(routed, step, max_steps)
        return found

    def _fallbacks(self, layers: Sequence[LayerRecord], step: int | None) -> list[Finding]:
        """Tokens of the fallback expert: one finding about all layers, until there have been none for a while."""
        shares = {record.layer: fallback_share(record) for record in layers if record.fallback_tokens}
        self._without_fallback = 0 if shares else self._without_fallback + 1
        if self._without_fallback >= LONG_PATIENCE:
            self.conditions.end("fallback", step)
        if not shares or "fallback" in self.conditions.present:
            return []
        worst = max(shares, key=lambda layer: shares[layer])
        key, z_loss = "optimizer.learning_rate", self.advice.change("balance.router_z_loss_coef", 2.0, 1e-3)
        words = (
            f"{100 * shares[worst]:.2g} % of the tokens of layer {worst} were routed by the fallback: the router's "
            f"outputs are not finite, in {len(shares)} of {len(layers)} layers; "
            f"{self.advice.learning_rate}, or {z_loss}"
        )
        evidence = {"share": shares[worst], "tokens": float(sum(record.fallback_tokens for record in layers))}
        finding = Finding("fallback_tokens", "warning", words, key, step, worst, evidence=evidence)
        return [self.conditions.begin("fallback", finding)]

    def _of(self, record: LayerRecord, step: int | None, at_least: int) -> list[Finding]:
        layer, load = record.layer, record.tokens_per_expert
        present, patience = conditions(record), max(self.patience, at_least)
        key, remedy = self.advice.balance

        def collapse() -> Finding:
            busiest = sorted(range(len(load)), key=lambda expert: -load[expert])[: max(1, record.top_k)]
            share = sum(load[expert] for expert in busiest) / sum(load)
            used = used_share(record) * len(load)
            words = (
                f"layer {layer}: the router has collapsed, its {len(busiest)} busiest experts of {len(load)} take "
                f"{100 * share:.0f} % of the load, as if {used:.1f} were in use; {remedy}"
            )
            evidence = {"used_share": used_share(record), "limit": collapse_limit(record), "share_of_busiest": share}
            return Finding("collapse", "critical", words, key, step, layer, tuple(busiest), evidence=evidence)

        def imbalance() -> Finding:
            busiest = load.index(max(load))
            words = (
                f"layer {layer}: expert {busiest} has {record.load_imbalance:.1f} times its fair share, and "
                f"every rank waits for it; {remedy}"
            )
            evidence = {"load_imbalance": record.load_imbalance, "limit": imbalance_limit(record)}
            return Finding("imbalance", "warning", words, key, step, layer, (busiest,), evidence=evidence)

        def saturated() -> Finding:
            z_loss = "balance.router_z_loss_coef"
            words = (
                f"layer {layer}: the router is certain of every token (entropy {record.router_entropy:.4f} nats of "
                f"{math.log(len(load)):.2f}, logits of {record.router_logits_rms:.1f}) and hardly learns any more; "
                f"{self.advice.change(z_loss, 2.0, 1e-3)}"
            )
            evidence = {name: getattr(record, f"router_{name}") for name in ("entropy", "confidence", "logits_rms")}
            evidence = {f"router_{name}": value for name, value in evidence.items()}
            return Finding("router_saturated", "warning", words, z_loss, step, layer, evidence=evidence)

        long, watch = max(LONG_PATIENCE, at_least), self.conditions.observe
        return [
            *self._dead_experts(record, step, patience),
            *watch(("collapse", layer), present["collapse"], patience, step, collapse),
            *watch(("imbalance", layer), present["imbalance"], long, step, imbalance),
            *watch(("saturated", layer), is_saturated(record), patience, step, saturated),
        ]

    def _dead_experts(self, record: LayerRecord, step: int | None, patience: int) -> list[Finding]:
        layer, load = record.layer, record.tokens_per_expert
        absent = self._absence[layer].observe(load)
        dead = [expert for expert, intervals in absent.items() if intervals >= patience]
        known, self._dead[layer] = self._dead[layer], set(dead)
        if known == set(dead):
            return []
        if not dead:
            self.conditions.end(("dead", layer), step)
            return []
        key, remedy = self.advice.balance
        names = ", ".join(map(str, dead[:8])) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
        words = f"layer {layer}: {len(dead)} of {len(load)} experts get no tokens ({names}); {remedy}"
        evidence = {"dead_experts": float(len(dead))}
        finding = Finding("dead_experts", "warning", words, key, step, layer, tuple(dead), evidence=evidence)
        self.conditions.begin(("dead", layer), finding)
        return [] if known.issuperset(dead) else [finding]

    def _unevenness(self, layers: Sequence[LayerRecord], step: int, max_steps: int | None) -> list[Finding]:
        """Load that is uneven without being a collapse or an imbalance: one finding about all layers."""
        settled = step > max(SETTLED, self.advice.warm_up_steps(max_steps))
        above = {record.layer: excess_cv(record) for record in layers if excess_cv(record) > EVEN_CV}
        bad = [record for record in layers if excess_cv(record) > uneven_limit(record)]
        found = []
        for severity, so in (("warning", bool(bad)), ("info", bool(above) and not bad)):

            def uneven(severity: Any = severity) -> Finding:
                worst = max(above, key=lambda layer: above[layer])
                key, remedy = self.advice.balance
                words = (
                    f"{len(above)} of {len(layers)} layers spread their load with a coefficient of variation above "
                    f"{EVEN_CV:g}, layer {worst} most ({above[worst]:.2f}); {remedy}"
                )
                evidence = {"load_cv": above[worst], "layers": float(len(above))}
                return Finding("uneven_load", severity, words, key, step, worst, evidence=evidence)

            key = ("uneven", severity)
            found += self.conditions.observe(key, settled and so, LONG_PATIENCE, step, uneven)
        return found


def fallback_share(record: LayerRecord) -> float:
    """Tokens that went to the fallback expert / all tokens. Such a token is one pair, of others there are K."""
    failed = record.fallback_tokens
    return failed / max(1, failed + (sum(record.tokens_per_expert) - failed) // max(1, record.top_k))


def collapse_limit(record: LayerRecord) -> float:
    """Share of the experts in use (exp(entropy) / E) below which a layer has collapsed: sqrt(K / E), halfway, by
    logarithm, between the K experts of a whole collapse and all E. Logs that do not know K are held against K = 1.
    """
    return math.sqrt(max(1, record.top_k) / len(record.tokens_per_expert))


def imbalance_limit(record: LayerRecord) -> float:
    """Load of the busiest expert / fair share that is too much: 3, or sqrt(E / K) where that is more, and at most
    halfway to the worst there can be, E / K; and what counting alone may add.
    """
    num_experts = len(record.tokens_per_expert)
    worst = num_experts / max(1, record.top_k)
    limit = min(max(IMBALANCED, math.sqrt(worst)), (1.0 + worst) / 2)
    return limit + NOISE * math.sqrt(limit * num_experts / max(1, sum(record.tokens_per_expert)))


def uneven_limit(record: LayerRecord) -> float:
    """Coefficient of variation that is a warning: a quarter of the worst there can be, and more than EVEN_CV."""
    worst = len(record.tokens_per_expert) / max(1, record.top_k)
    return max(EVEN_CV, UNEVEN_CV * math.sqrt(max(0.0, worst - 1.0)))


def excess_cv(record: LayerRecord) -> float:
    """The coefficient of variation without the part that counting alone makes (that of Poisson counts)."""
    chance = len(record.tokens_per_expert) / max(1, sum(record.tokens_per_expert))
    return math.sqrt(max(0.0, record.load_cv**2 - chance))


def conditions(record: LayerRecord) -> dict[str, bool]:
    """What is wrong with a layer's balance in this very interval, besides experts that are absent; an imbalance that is
    a collapse counts as that. With K = E every expert gets every token, and nothing can be wrong.
    """
    if record.top_k >= len(record.tokens_per_expert):
        return {"collapse": False, "imbalance": False}
    collapsed = used_share(record) < collapse_limit(record)
    return {"collapse": collapsed, "imbalance": record.load_imbalance > imbalance_limit(record) and not collapsed}


def is_saturated(record: LayerRecord) -> bool:
    """Whether scores are all but one-hot. A router without scores has entropy and confidence 0: not saturated."""
    num_experts = len(record.tokens_per_expert)
    limit = SATURATED * math.log(num_experts) if num_experts > 1 else 0.0
    return record.router_confidence > 0.5 and record.router_entropy < limit
