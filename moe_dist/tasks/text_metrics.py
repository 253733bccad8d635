"""Answers against references: shares, macro F1, BLEU, chrF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

References = Sequence[Sequence[str]]
"""Right answers of each row, one or more."""


def accuracy(right: Sequence[int], found: Sequence[int]) -> float:
    """Share of rows whose class was found."""
    return sum(a == b for a, b in zip(right, found, strict=True)) / len(right)


def macro_f1(right: Sequence[int], found: Sequence[int]) -> float:
    """Mean of F1 over all classes that are right or were found somewhere, as `sklearn.metrics.f1_score` with
    average="macro"."""
    classes = sorted({*right, *found})
    pairs = list(zip(right, found, strict=True))
    each = []
    for one in classes:
        hits = sum(a == b == one for a, b in pairs)
        each.append(2 * hits / sum((a == one) + (b == one) for a, b in pairs))
    return sum(each) / len(each)


def exact_match(answers: Sequence[str], references: References) -> float:
    """Share of answers that are one of their references, but for blanks around both."""
    hits = (answer.strip() in {one.strip() for one in right} for answer, right in zip(answers, references, strict=True))
    return sum(hits) / len(answers)


def bleu(answers: Sequence[str], references: References) -> float:
    """BLEU of all rows together, 0 to 100, by sacrebleu's defaults. Raises ValueError where it is not installed."""
    return float(_sacrebleu().corpus_bleu(list(answers), _columns(references)).score)


def chrf(answers: Sequence[str], references: References) -> float:
    """chrF of all rows together, 0 to 100, by sacrebleu's defaults. Raises ValueError where it is not installed."""
    return float(_sacrebleu().corpus_chrf(list(answers), _columns(references)).score)


def bleu_rows(answers: Sequence[str], references: References) -> list[list[float]]:
    """What each row adds to BLEU: matches and n-grams by length, then lengths of answer and reference."""
    one = _sacrebleu().BLEU(effective_order=True)
    scores = [one.sentence_score(answer, list(right)) for answer, right in zip(answers, references, strict=True)]
    return [[*map(float, score.counts), *map(float, score.totals), score.sys_len, score.ref_len] for score in scores]


def bleu_of(sums: Sequence[float]) -> float:
    """BLEU of rows, from the sum of their `bleu_rows`."""
    whole = [round(value) for value in sums]
    score = _sacrebleu().BLEU.compute_bleu(whole[:4], whole[4:8], whole[8], whole[9], smooth_method="exp")
    return float(score.score)


def _columns(references: References) -> list[list[str | None]]:
    """The first references of all rows, the second ones, ...; None: a row has fewer."""
    width = max(map(len, references))
    return [[row[index] if index < len(row) else None for row in references] for index in range(width)]


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise ValueError("BLEU and chrF need sacrebleu: pip install 'moe-dist[evaluate]'") from error
    return sacrebleu
