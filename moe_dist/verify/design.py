"""Few scenarios in which every value, or every pair of values, of all features and all axes of a layout occurs.

A bug is seldom in one feature alone: it is in one feature under one kind of sharding, or in two features together. All
combinations are far too many; all pairs fit into some seventy scenarios. Imports no torch.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from moe_dist.verify.bugs import BUGS, Bug
from moe_dist.verify.features import COSTS, FEATURES, LOW_PRECISION, ONCE
from moe_dist.verify.layouts import Case, layouts
from moe_dist.verify.scenarios import Scenario, Smallness

Value = tuple[str, str]
"""(axis or feature, its value)."""
Item = frozenset[Value]
"""Values that are wanted together in one scenario: one, two or three."""

PLAIN = "plain"
_OWN = ("own_experts", "noisy_experts")
_CANDIDATES = 4
_COSTLY = ("depth", "compilation", "accumulation", "experts", "recomputation")
"""Axes and features with values that take more work than the plain one, those of most first."""


def values_of(scenario: Scenario) -> dict[str, str]:
    """The value of every axis and feature."""
    chosen = scenario.features or frozenset()
    found = {feature: next((w for w in words if w in chosen), PLAIN) for feature, words in FEATURES.items()}
    return scenario.layout.axes | found


def scenario_of(layout: Case, found: dict[str, str]) -> Scenario:
    """The scenario with these values of features in this layout."""
    return Scenario(layout, frozenset(word for feature, word in found.items() if feature in FEATURES and word != PLAIN))


def _without(case: Scenario, axis: str) -> Scenario:
    """With the value of this axis or feature that takes least work."""
    if axis == "accumulation":
        return replace(case, layout=replace(case.layout, accumulation=case.layout.pp_size))
    if axis == "recomputation":
        return replace(case, layout=replace(case.layout, recompute="none"))
    return replace(case, features=(case.features or frozenset()).difference(FEATURES[axis]))


def _shows(scenario: Scenario, bug: Bug) -> bool:
    """Whether the bug acts there, and however small what it does is: in low precision it might be lost, and in float32
    beside what ten layers make of rounding.
    """
    features = scenario.features or frozenset()
    coarse = LOW_PRECISION | ({"deep"} if scenario.precision == "float32" else set())
    return bug.acts_in([scenario.layout], features) and not (features - set(bug.words)) & coarse


@dataclass
class Design:
    """`refused`: pairs that no configuration may have, counted by the reason."""

    scenarios: list[Scenario] = field(default_factory=list)
    num_items: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def num_covered(self) -> int:
        return self.num_items - self.refused.total()


class Designer:
    """Chooses scenarios for the ranks of one world. The same seed chooses the same."""

    def __init__(self, small: Smallness, seed: int = 0) -> None:
        self.small, self.random = small, random.Random(seed)
        every = layouts(small.config, small.world_size)
        self.layouts = [layout for layout in every if small.refusal(Scenario(layout, frozenset())) is None]
        self.by_axis: dict[Value, list[Case]] = defaultdict(list)
        for layout in self.layouts:
            for value in layout.axes.items():
                self.by_axis[value].append(layout)
        self.values: dict[str, list[str]] = {
            axis: sorted({layout.axes[axis] for layout in self.layouts}) for axis in self.layouts[0].axes
        } | {feature: [PLAIN, *words] for feature, words in FEATURES.items()}

    def singles(self) -> Design:
        """Every value at least once."""
        return self._cover({frozenset([value]) for value in self._all_values()})

    def pairs(self) -> Design:
        """Every pair of values, the triples that have shown bugs, and for every known bug a case that shows it."""
        wanted = {frozenset(pair) for pair in itertools.combinations(self._all_values(), 2) if pair[0][0] != pair[1][0]}
        wanted |= {frozenset([value]) for value in self._all_values()} | set(self._triples())
        # What costs much is wanted once, and of layouts only what there is.
        rare = {item for item in wanted if len(item) > 1 and any(word in ONCE for _, word in item)}
        design = self._cover({item for item in wanted - rare if self._layouts_with(item)})
        for bug in BUGS.values():
            if not bug.life and not any(_shows(case, bug) for case in design.scenarios):
                design.scenarios += self._showing(bug)
        return design

    def _showing(self, bug: Bug) -> list[Scenario]:
        """A scenario in which the bug acts, with nothing beside it; none where these ranks cannot have one."""
        words = frozenset(bug.words)
        cases = (Scenario(layout, words) for layout in self.layouts if bug.acts_in([layout], words))
        return list(itertools.islice((case for case in cases if self.small.refusal(case) is None), 1))

    def forever(self) -> Iterator[Scenario]:
        """Scenarios drawn at random, for as long as wanted: a third of the features each, so that every three values
        come together sooner or later.
        """
        while True:
            layout = self.random.choice(self.layouts)
            found = dict.fromkeys(FEATURES, PLAIN)
            for feature in self.random.sample(list(FEATURES), len(FEATURES)):
                word = self.random.choice(self.values[feature])
                if word in ONCE or self.random.random() > 0.5:
                    continue
                if self.small.refusal(scenario_of(layout, found | {feature: word})) is None:
                    found[feature] = word
            yield scenario_of(layout, found)

    def _all_values(self) -> list[Value]:
        return [(axis, value) for axis, values in self.values.items() for value in values]

    def _triples(self) -> Iterator[Item]:
        axes = self.values
        for sharding, often in itertools.product(axes["sharding"], axes["accumulation"]):
            for pipeline in axes["pipeline"]:
                if pipeline == "no pipeline" or pipeline.startswith("pp2-"):
                    yield frozenset({("pipeline", pipeline), ("sharding", sharding), ("accumulation", often)})
        for experts, pipeline in itertools.product(_OWN, axes["pipeline"]):
            if pipeline.startswith("pp2-"):
                yield frozenset({("experts", experts), ("pipeline", pipeline), ("recomputation", "full")})
        for optimizer, sharding in itertools.product(axes["optimizer"], axes["sharding"]):
            yield frozenset({("optimizer", optimizer), ("sharding", sharding), ("precision", "pure_bf16")})

    def _cover(self, wanted: set[Item]) -> Design:
        """First all without bfloat16, where only large bugs are seen; then what is wanted with it."""
        design = Design(num_items=len(wanted))
        coarse = {item for item in wanted if any(word in LOW_PRECISION for _, word in item)}
        for items in (wanted - coarse, coarse):
            self._add(design, items)
        return design

    def _add(self, design: Design, wanted: set[Item]) -> None:
        """Scenarios in which all of `wanted` are; bfloat16 only where that is wanted."""
        left = dict.fromkeys(sorted(wanted, key=sorted))  # an ordered set
        chosen: list[Scenario] = []
        while left:
            partners: dict[Value, set[Value]] = defaultdict(set)
            for item in left:
                if len(item) <= 2:
                    for value in item:
                        partners[value] |= item - {value}
            # Three values together are the hardest to have; then any.
            most = max(map(len, left))
            start = self.random.choice([item for item in left if len(item) == most])
            found = [made for _ in range(_CANDIDATES) if (made := self._with(start, partners, left)) is not None]
            if not found:
                design.refused[self._reason(start)] += 1
                del left[start]
                continue
            _, scenario = max(found, key=lambda pair: pair[0])
            chosen.append(scenario)
            have = set(values_of(scenario).items())
            left = {item: None for item in left if not item <= have}
        design.scenarios += self._lighter(chosen, wanted)

    def _lighter(self, cases: list[Scenario], wanted: set[Item]) -> list[Scenario]:
        """Scenarios in which all is that of `wanted` is in `cases`, for less work: without a case, and then without a
        costly value, where other cases have all that would be missing.
        """
        items = {case: self._items(case, wanted) for case in cases}
        count = Counter(item for have in items.values() for item in have)

        def others_have(lost: set[Item]) -> bool:
            return all(count[item] > 1 for item in lost)

        heaviest_first = sorted(items, key=self.work, reverse=True)
        for case in heaviest_first:
            if others_have(items[case]):
                count.subtract(items.pop(case))
        for case in heaviest_first:
            if case not in items:
                continue
            for axis in _COSTLY:
                lighter = _without(case, axis)
                if lighter == case or lighter in items or self.small.refusal(lighter) is not None:
                    continue
                have = self._items(lighter, wanted)
                if others_have(items[case] - have):
                    count.subtract(items.pop(case))
                    count.update(have)
                    items[lighter] = have
                    case = lighter
        return list(items)

    @staticmethod
    def _items(case: Scenario, wanted: set[Item]) -> set[Item]:
        have = set(values_of(case).items())
        return {item for item in wanted if item <= have}

    def work(self, case: Scenario) -> float:
        """About how much a case computes: layers of micro-batches."""
        features, layout = case.features or frozenset(), case.layout
        factor = float(math.prod(COSTS.get(word, 1) for word in features if word != "deep"))
        factor *= 1.3 if layout.recompute == "full" else 1.0
        return factor * case.num_layers * self.small.world_size // layout.pp_size * layout.accumulation

    def _with(
        self, start: Item, partners: dict[Value, set[Value]], left: dict[Item, None]
    ) -> tuple[int, Scenario] | None:
        """A scenario that has `start` and as much else that is still wanted as can be."""
        words = {feature: word for feature, word in start if feature in FEATURES}
        wanted = {value for item in left for value in item}
        found = dict.fromkeys(FEATURES, PLAIN) | words
        possible = self._layouts_with(start)
        sample = self.random.sample(possible, min(len(possible), 12))
        feasible = [layout for layout in sample if self.small.refusal(scenario_of(layout, found)) is None]
        if not feasible:
            feasible = [layout for layout in possible if self.small.refusal(scenario_of(layout, found)) is None][:1]
        if not feasible:
            return None
        have = set(words.items())
        layout = max(feasible, key=lambda layout: self._gain(set(layout.axes.items()) | have, partners))
        have |= set(layout.axes.items())
        for feature in self.random.sample(list(FEATURES), len(FEATURES)):
            if feature in words:
                continue
            gains = {
                word: (len(partners[feature, word] & have) + self.random.random()) / COSTS.get(word, 1)
                for word in self.values[feature]
                if (word not in ONCE or frozenset([(feature, word)]) in left)
                and (word not in LOW_PRECISION or (feature, word) in wanted)
            }
            for word in sorted(gains, key=lambda word: gains[word], reverse=True):
                if word == PLAIN or self.small.refusal(scenario_of(layout, found | {feature: word})) is None:
                    found[feature] = word
                    break
            have.add((feature, found[feature]))
        scenario = scenario_of(layout, found)
        if self.small.refusal(scenario) is not None:
            return None
        covered = set(values_of(scenario).items())
        return sum(item <= covered for item in left), scenario

    def _layouts_with(self, start: Item) -> list[Case]:
        axes = [value for value in start if value[0] not in FEATURES]
        if not axes:
            return self.layouts
        fewest = min((self.by_axis[value] for value in axes), key=len)
        return [layout for layout in fewest if all(layout.axes[axis] == value for axis, value in axes)]

    @staticmethod
    def _gain(have: set[Value], partners: dict[Value, set[Value]]) -> int:
        return sum(len(partners[value] & have) for value in have)

    def _reason(self, start: Item) -> str:
        """Why no scenario may have these values."""
        possible = self._layouts_with(start)
        found = dict.fromkeys(FEATURES, PLAIN) | {feature: word for feature, word in start if feature in FEATURES}
        return self.small.refusal(scenario_of(possible[0], found)) or "not together with the other values"
