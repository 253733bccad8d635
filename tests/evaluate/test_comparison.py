"""Bootstrap intervals: what a paired drawing can tell, and numbers of drawn rows against other packages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import tiny_config

from moe_dist.evaluate import comparison
from moe_dist.evaluate.comparison import compare
from moe_dist.models.counts import dense_flops_per_token, flops_per_token
from moe_dist.tasks import text_metrics
from moe_dist.tasks.result import Sums


def model(losses: Any, sizes: Any = 10) -> dict[str, Any]:
    rows = [[float(loss), 10.0] for loss in losses]
    return {"sums": {"loss": Sums("ratio", rows).to_json()}, "sample_bytes": [sizes] * len(rows)}


def test_the_same_samples_are_drawn_for_both_models() -> None:
    """What is hard for both hides no difference. Seen red with another seed for the second model."""
    draw = np.random.default_rng(1)
    hard = draw.normal(30, 8, 200)
    first, second = model(hard), model(hard - 0.5 + draw.normal(0, 0.2, 200))
    one = compare([first, second]).differences[1]["loss"]
    assert one.value == pytest.approx(-0.05, abs=0.01)
    assert one.is_paired
    assert one.verdict == "better"
    assert one.high - one.low < 0.02
    assert compare([second, first]).differences[1]["loss"].verdict == "worse"
    alone = compare([first, model(hard - 0.5, sizes=11)]).differences[1]["loss"]  # other samples, by their bytes
    assert not alone.is_paired
    assert alone.verdict == "="
    assert alone.high - alone.low > 0.1


def test_an_interval_is_as_wide_as_the_mean_is_uncertain(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = np.random.default_rng(3).normal(20, 5, 400)
    whole = compare([model(losses)]).intervals[0]["loss"]
    wide = 2 * 1.96 * losses.std() / 20 / 10  # by the normal distribution; 400 samples, 10 tokens each
    assert whole.value == pytest.approx(losses.mean() / 10)
    assert whole.high - whole.low == pytest.approx(wide, rel=0.1)
    monkeypatch.setattr(comparison, "_AT_ONCE", 4000)  # as with very many samples
    assert compare([model(losses)]).intervals[0]["loss"] == whole


def test_numbers_of_drawn_rows_are_those_of_the_rows_themselves() -> None:
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(5)
    times = draw.multinomial(40, np.full(40, 1 / 40))
    chosen = np.repeat(np.arange(40), times)
    right, found = draw.integers(0, 3, 40), draw.integers(0, 3, 40)
    pairs = list(zip(right, found, strict=True))
    rows = [[float(s) for one in range(3) for s in (a == b == one, a == one, b == one)] for a, b in pairs]
    wanted = f1_score(right[chosen], found[chosen], average="macro")
    assert Sums("macro_f1", rows).value(list(times @ np.asarray(rows))) == pytest.approx(wanted)
    words = ["a", "cat", "sat", "on", "the", "mat", "."]
    answers = [" ".join(draw.choice(words, 8)) for _ in range(40)]  # shorter than what is right
    references = [[" ".join(draw.choice(words, 12)), answer + " . a cat"] for answer in answers]
    sums = times @ np.asarray(text_metrics.bleu_rows(answers, references))
    again = text_metrics.bleu([answers[i] for i in chosen], [references[i] for i in chosen])
    assert Sums("bleu", []).value(list(sums)) == pytest.approx(again)


def test_the_dense_model_of_equal_width_is_one_without_experts() -> None:
    sizes = ("model.mlp_only_layers=[]", "model.shared_expert_intermediate_size=0")
    sparse = tiny_config(*sizes).model
    every = "model.mlp_only_layers=[0,1,2]"
    dense = tiny_config(every, sizes[1], f"model.intermediate_size={sparse.num_experts * sparse.moe_intermediate_size}")
    assert dense_flops_per_token(sparse, 16) == flops_per_token(dense.model, 16)
    assert flops_per_token(sparse, 16) < dense_flops_per_token(sparse, 16)
