"""Which weights a run trains: what `train.freeze` and `train.train_only` say, weight by weight. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from moe_dist.config.sections.all import Sections
from moe_dist.config.sections.trained import MEASURED, WeightPattern
from moe_dist.config.wording import ConfigError

ChosenExperts = Mapping[int, frozenset[int]]
"""Layer -> experts that carry the task's tokens."""
_LAYER = re.compile(r"^layers\.(\d+)\.")
_ROUTED = ".moe.experts."
_OWN_EXPERT = re.compile(r"\.moe\.experts\.experts\.(\d+)\.")
"""In a name of an expert of a person's own class, which is a module for each."""


@dataclass(frozen=True)
class TrainedWeights:
    """Of one model. `chosen`: what `experts:esft` stands for; None: not measured yet, so all."""

    frozen: tuple[WeightPattern, ...]
    only: tuple[WeightPattern, ...]
    num_experts: int
    chosen: ChosenExperts | None = None

    @staticmethod
    def of(config: Sections, chosen: ChosenExperts | None = None) -> TrainedWeights:
        """As the configuration says; a router that `balance.freeze_router` keeps is frozen too."""
        keeps_router = config.balance.freeze_router and not config.lora.r  # beside adapters it is frozen anyway
        frozen = [*config.train.freeze, *(["router"] if keeps_router else [])]
        still, only = (tuple(map(WeightPattern.parse, texts)) for texts in (frozen, config.train.train_only))
        return TrainedWeights(still, only, config.model.num_experts, chosen)

    @property
    def are_all(self) -> bool:
        """Whether nothing is frozen."""
        return not self.frozen and not self.only

    @property
    def are_measured(self) -> bool:
        """Whether experts are to be chosen by what they do (`experts:esft`)."""
        return any(pattern.experts == MEASURED for pattern in self.only)

    @cached_property
    def _every(self) -> frozenset[int]:
        return frozenset(range(max(1, self.num_experts)))

    def part(self, name: str) -> bool | frozenset[int]:
        """Whether the weight of this logical name is trained; of a stack of experts the ids of some."""
        kept = self._union(self.only, name) if self.only else self._every
        kept = kept - self._union(self.frozen, name)
        if _OWN_EXPERT.search(name) or _ROUTED not in name or not self.num_experts:
            return kept == self._every  # never in part
        return kept if kept and kept != self._every else bool(kept)

    def _union(self, patterns: Iterable[WeightPattern], name: str) -> frozenset[int]:
        """Experts of the weight that any pattern names: all of them for one that is no stack."""
        found: frozenset[int] = frozenset()
        for pattern in patterns:
            found |= self._named(pattern, name)
        return found

    def _named(self, pattern: WeightPattern, name: str) -> frozenset[int]:
        layer = _LAYER.match(name)
        if pattern.experts is None:
            of_layer = pattern.layers is not None and layer is not None and int(layer[1]) in pattern.layers
            return self._every if of_layer or pattern.matches(name) else frozenset()
        if _ROUTED not in name or layer is None:
            return frozenset()
        ids = pattern.experts
        if ids == MEASURED:
            ids = self._every if self.chosen is None else self.chosen.get(int(layer[1]), frozenset())
        if own := _OWN_EXPERT.search(name):
            return self._every if int(own[1]) in ids else frozenset()
        return frozenset(ids)

    def experts_of_module(self, name: str) -> list[str]:
        """The names that a weight of one expert of a person's own class has in all experts; none for another."""
        own = _OWN_EXPERT.search(name)
        if own is None:
            return []
        return [f"{name[: own.start(1)]}{expert}{name[own.end(1) :]}" for expert in range(self.num_experts)]

    def check(self, names: Iterable[str], trainable: Iterable[str]) -> None:
        """Raises ConfigError for a pattern that names none of the model's weights, and where nothing is left to train
        of those that could be."""
        names = list(names)
        for key, patterns in (("freeze", self.frozen), ("train_only", self.only)):
            for pattern in patterns:
                if not any(self._named(pattern, name) for name in names):
                    words = sorted({word for name in names for word in name.split(".") if not word.isdigit()})
                    near = difflib.get_close_matches(pattern.text.strip("*."), words, n=1)
                    hint = f"did you mean {near[0]}? " if near else ""
                    raise ConfigError(
                        f"train.{key}={pattern.text}: names no weight of this model; {hint}they are named like "
                        f"{names[len(names) // 2]}"
                    )
        if not any(map(self.part, trainable)):
            only = [pattern.text for pattern in self.only] or "all"
            raise ConfigError(
                f"train.freeze={[pattern.text for pattern in self.frozen]}: nothing of train_only={only} would be "
                "trained; leave something out"
            )
