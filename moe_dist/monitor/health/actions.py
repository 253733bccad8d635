"""Which balancing to raise, where and when: a policy over whole logging intervals. `train/acting.py` applies it.

It sees integers only, counts of the whole run's tokens, so that it says the same in every layout; and it keeps the
counts of an unfinished interval, so that a run that goes on from a checkpoint decides as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from moe_dist.config import BalanceConfig
from moe_dist.monitor.expert_stats import layer_record
from moe_dist.monitor.health.rules import PATIENCE_OF, Absence, conditions
from moe_dist.monitor.records import ActionRecord, LayerRecord

FACTOR = 2.0
"""One step up or down."""
NAMES = {
    "dead_experts": "experts get no tokens",
    "collapse": "the router has collapsed",
    "imbalance": "one expert has far more than its fair share",
}


class Lever(NamedTuple):
    """A key that can be raised in steps from what is configured to a bound."""

    key: str
    start: float
    bound: float

    def at(self, level: int) -> float:
        """The value after so many steps, never beyond the bound."""
        return self.start if level == 0 else min(self.bound, self.start * FACTOR**level)


def levers(balance: BalanceConfig) -> list[Lever]:
    """Those that the run's routing has, the first to use first: the bias does not disturb the loss.

    A router that is not trained (`freeze_router`) does not heed the auxiliary loss.
    """
    found = [Lever("bias_update_rate", balance.bias_update_rate, balance.act_max_bias_update_rate)]
    if not balance.freeze_router:
        found.append(Lever("router_aux_loss_coef", balance.aux_loss_coef, balance.act_max_aux_loss_coef))
    return [lever for lever in found if lever.start > 0]


class Policy:
    """Raises one lever of a layer by one step when its trouble has lasted as long as a finding takes, then again after
    every `cooldown` logging intervals in which it is still there; takes the steps back, the last one first, after
    `cooldown` intervals without any trouble. Layers are treated apart.
    """

    def __init__(self, levers: Sequence[Lever], layers: Sequence[int], top_k: int, cooldown: int, apply: bool) -> None:
        """`layers`: numbers of all expert layers. `apply`: what the records say about themselves."""
        self.levers, self.top_k, self.cooldown, self.apply = list(levers), top_k, cooldown, apply
        self._layers = {layer: _Layer([0] * len(self.levers)) for layer in layers}

    def add(self, pairs: Mapping[int, Sequence[int]]) -> None:
        """Count (token, expert) pairs of a part of an interval, by layer and expert."""
        for layer, counts in pairs.items():
            before = self._layers[layer].pairs or [0] * len(counts)
            self._layers[layer].pairs = [old + new for old, new in zip(before, counts, strict=True)]

    def decide(self, step: int) -> list[ActionRecord]:
        """The interval is whole: what to change after `step`."""
        found = []
        for layer, state in self._layers.items():
            pairs, state.pairs = state.pairs, []
            if not sum(pairs):
                continue
            record = layer_record(layer, pairs, 0, sum(pairs) // self.top_k, {}, self.top_k)
            lasting, calm = state.observe(record)
            if state.wait:
                continue
            change = self._up(state) if lasting else self._down(state) if calm >= self.cooldown else None
            if change is None:
                continue
            number, level = change
            lever, before = self.levers[number], state.levels[number]
            state.levels[number], state.wait = level, self.cooldown
            reason = NAMES[lasting] if lasting else f"no trouble for {calm} intervals"
            key, applied = f"balance.{lever.key}", self.apply
            found.append(ActionRecord(step, layer, key, lever.at(before), lever.at(level), reason, applied))
        return found

    def _up(self, state: _Layer) -> tuple[int, int] | None:
        for number, (lever, level) in enumerate(zip(self.levers, state.levels, strict=True)):
            if lever.at(level) < lever.bound:
                return number, level + 1
        return None

    def _down(self, state: _Layer) -> tuple[int, int] | None:
        for number, level in reversed(list(enumerate(state.levels))):
            if level:
                return number, level - 1
        return None

    def values(self, layer: int) -> dict[str, float]:
        """What each lever of a layer stands at, by its key in `balance`."""
        levels = self._layers[layer].levels
        return {lever.key: lever.at(level) for lever, level in zip(self.levers, levels, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            str(layer): {
                "levels": list(state.levels),
                "wait": state.wait,
                "lasted": dict(state.lasted),
                "calm": state.calm,
                "pairs": list(state.pairs),
                "absence": asdict(state.absence),
            }
            for layer, state in self._layers.items()
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; layers that it does not know start anew."""
        for layer in self._layers:
            known = saved.get(str(layer))
            if known is not None and len(known["levels"]) == len(self.levers):
                # A checkpoint of an older version does not know which experts were absent.
                self._layers[layer] = _Layer(**known | {"absence": Absence(**known.get("absence", {}))})


@dataclass
class _Layer:
    """Where one layer stands."""

    levels: list[int]
    """Steps that each lever stands above its start."""
    wait: int = 0
    """Intervals until something may change again."""
    lasted: dict[str, int] = field(default_factory=dict)
    """Intervals in a row with each trouble."""
    calm: int = 0
    """Intervals in a row without any."""
    pairs: list[int] = field(default_factory=list)
    """Of each expert, in the interval that is not whole yet."""
    absence: Absence = field(default_factory=Absence)

    def observe(self, record: LayerRecord) -> tuple[str | None, int]:
        """The trouble that has lasted, if any, and the number of intervals in a row without any."""
        absent = self.absence.observe(record.tokens_per_expert)
        present = conditions(record)
        self.lasted = {kind: self.lasted.get(kind, 0) + 1 for kind, is_there in present.items() if is_there}
        if absent:  # of each expert by itself: another one every time is no dead expert
            self.lasted = {"dead_experts": max(absent.values())} | self.lasted
        self.calm = 0 if self.lasted else self.calm + 1
        self.wait = max(0, self.wait - 1)
        return next((kind for kind, count in self.lasted.items() if count >= PATIENCE_OF[kind]), None), self.calm
