"""Several models on the same samples: intervals of their numbers, and of what one has more than another.

Bootstrap (Efron 1979; paired as in Koehn 2004): samples are drawn with replacement, the same ones for all models, and
the numbers computed again, so that what all models find hard does not hide their difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_dist.tasks.result import Sums

NUM_DRAWS = 1000
LEVEL = 0.95
_LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
_AT_ONCE = 20_000_000
"""Numbers of drawn counts that are there at once."""


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """`value`: what a model has more than the first."""

    is_paired: bool
    verdict: str
    """better, worse, or = where the interval has 0 in it."""


@dataclass(frozen=True)
class Comparison:
    """Of each model by metric."""

    intervals: list[dict[str, Interval]]
    differences: list[dict[str, Difference]]
    """From the first model, which has none."""

    def to_json(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for number, (own, others) in enumerate(zip(self.intervals, self.differences, strict=True)):
            found.append({"intervals": {metric: [one.low, one.high] for metric, one in own.items()}})
            if number:
                found[-1]["differences"] = {
                    metric: {
                        "difference": one.value,
                        "low": one.low,
                        "high": one.high,
                        "paired": one.is_paired,
                        "verdict": one.verdict,
                    }
                    for metric, one in others.items()
                }
        return found


def short_names(models: Sequence[str]) -> list[str]:
    """Without the folders that all have in common."""
    parts = [model.rstrip("/").split("/") for model in models]
    shared = 0
    while len(parts) > 1 and all(len(one) > shared + 1 for one in parts) and len({one[shared] for one in parts}) == 1:
        shared += 1
    return ["/".join(one[shared:]) for one in parts]


def is_lower_better(metric: str) -> bool:
    return metric.rpartition(": ")[2].endswith(_LOWER_IS_BETTER)


def compare(models: Sequence[Mapping[str, Any]]) -> Comparison:
    """`models`: of each what `Evaluation.write` keeps of its samples, in one order. Where the texts of two models are
    cut into other samples, as by another tokenizer, theirs are drawn by themselves.
    """
    each = [{metric: Sums(**of) for metric, of in model.get("sums", {}).items()} for model in models]
    drawn = [{metric: _draws(sums, 0) for metric, sums in model.items()} for model in each]
    values = [{metric: sums.value(_total(sums)) for metric, sums in model.items()} for model in each]
    intervals = [
        {metric: Interval(values[number][metric], *_bounds(of)) for metric, of in model.items()}
        for number, model in enumerate(drawn)
    ]
    differences: list[dict[str, Difference]] = [{} for _ in models]
    for number in range(1, len(models)):
        for metric in [metric for metric in each[0] if metric in each[number]]:
            first, mine = each[0][metric], each[number][metric]
            is_text = ": " not in metric
            is_paired = len(first.rows) == len(mine.rows) and not (
                is_text and models[0]["sample_bytes"] != models[number]["sample_bytes"]
            )
            theirs = drawn[number][metric] if is_paired else _draws(mine, number)
            low, high = _bounds(theirs - drawn[0][metric])
            sign = -1 if is_lower_better(metric) else 1
            verdict = (
                "better" if min(sign * low, sign * high) > 0 else "worse" if max(sign * low, sign * high) < 0 else "="
            )
            more = values[number][metric] - values[0][metric]
            differences[number][metric] = Difference(more, low, high, is_paired, verdict)
    return Comparison(intervals, differences)


def _total(sums: Sums) -> list[float]:
    return [float(one) for one in np.asarray(sums.rows, dtype=np.float64).sum(0)]


def _draws(sums: Sums, seed: int) -> npt.NDArray[np.float64]:
    """The number of NUM_DRAWS drawings of as many rows; of equally many rows and one seed the same rows are drawn."""
    rows = np.asarray(sums.rows, dtype=np.float64)
    draw, count = np.random.default_rng(seed), len(sums.rows)
    found: list[float] = []
    while len(found) < NUM_DRAWS:
        at_once = min(NUM_DRAWS - len(found), max(1, _AT_ONCE // count))
        times = draw.multinomial(count, np.full(count, 1 / count), size=at_once)
        found += [sums.value([float(one) for one in total]) for total in times @ rows]
    return np.asarray(found)


def _bounds(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)
