"""One entry of `train.freeze` and `train.train_only`."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

MEASURED: Literal["esft"] = "esft"
"""In the place of expert ids: those that the task's tokens go to."""
_NUMBERS = re.compile(r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*")
_NAME = re.compile(r"[\w.*?-]+")
FORMS = "a name with * and ?, experts:3,7, experts:esft or layers:10-20"


@dataclass(frozen=True)
class WeightPattern:
    """`text` names weights: by their `layers`, as `experts` of them, or else by parts of their names."""

    text: str
    layers: frozenset[int] | None = None
    experts: frozenset[int] | Literal["esft"] | None = None

    @staticmethod
    def parse(text: str) -> WeightPattern:
        """Raises ValueError for what is none."""
        word, colon, numbers = text.replace(" ", "").partition(":")
        if not colon and _NAME.fullmatch(word):
            return WeightPattern(word)
        if (word, numbers) == ("experts", MEASURED):
            return WeightPattern(f"experts:{MEASURED}", experts=MEASURED)
        if word in ("experts", "layers") and _NUMBERS.fullmatch(numbers):
            return WeightPattern(f"{word}:{numbers}", **{word: _ids(numbers)})
        raise ValueError(f"{text}: one of {FORMS}")

    def matches(self, name: str) -> bool:
        """Whether whole parts of this name are those of the text: `router` those of `layers.0.moe.router.weight`."""
        return self.layers is None and self.experts is None and self._form.match(f".{name}.") is not None

    @cached_property
    def _form(self) -> re.Pattern[str]:
        return re.compile(fnmatch.translate(f"*.{self.text}.*"))


def _ids(numbers: str) -> frozenset[int]:
    found: set[int] = set()
    for one in numbers.split(","):
        first, _, last = one.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def entries(value: Any) -> Any:
    """A list of patterns out of what a file has: one alone, or one that a list in brackets has split at its commas
    (`[experts:3,7]` is `experts:3` and 7 to YAML)."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return value
    found: list[Any] = []
    for entry in value:
        goes_on = not isinstance(entry, bool) and isinstance(entry, (int, str)) and _NUMBERS.fullmatch(str(entry))
        if goes_on and found and isinstance(found[-1], str) and re.fullmatch(r"(experts|layers):[\d,-]+", found[-1]):
            found[-1] = f"{found[-1]},{entry}"
        else:
            found.append(entry)
    return found
