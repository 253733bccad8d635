"""What a task has found, and what each of its rows adds to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_dist.tasks import text_metrics

Kind = Literal["ratio", "perplexity", "macro_f1", "bleu"]


@dataclass(frozen=True)
class Sums:
    """What rows add to a number, so that it can be had of any choice of them: the number is a function of the sum.

    `kind`: "ratio" (first / second column), "perplexity" (exp of it), "macro_f1" (for each class hits, right and found
    ones), "bleu" (matches and n-grams by length, then lengths of answer and reference).
    """

    kind: Kind
    rows: list[list[float]]
    factor: float = 1.0
    """Of what comes out."""

    def value(self, total: Sequence[float]) -> float:
        """The number, of the sum of some rows; NaN where these say nothing."""
        if self.kind == "bleu":
            return text_metrics.bleu_of(total)
        if self.kind == "macro_f1":
            classes = zip(total[::3], total[1::3], total[2::3], strict=True)
            each = [2 * hits / (right + found) for hits, right, found in classes if right + found]
            return math.fsum(each) / len(each) if each else math.nan
        mean = total[0] / total[1] if total[1] else math.nan
        return self.factor * (math.exp(min(mean, 700.0)) if self.kind == "perplexity" else mean)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class TaskResult:
    """`metrics`: by name; `sums`: of those of them that intervals can be had of."""

    metrics: Mapping[str, float]
    num_rows: int
    sums: Mapping[str, Sums] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The metrics, and `samples`."""
        return {**self.metrics, "samples": self.num_rows}


def means(columns: Mapping[str, Sequence[float]]) -> dict[str, Sums]:
    """Of metrics that are means of a number of each row."""
    return {name: Sums("ratio", [[float(value), 1.0] for value in values]) for name, values in columns.items()}
