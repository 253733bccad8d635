"""Files of rows: metrics equal sacrebleu's and scikit-learn's, answers those of a plain forward pass, in any layout."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import mesh_of, tiny_config

from moe_dist.data.tokenizer import ByteTokenizer
from moe_dist.generate.options import SamplingOptions
from moe_dist.parallel.parallelize import build_part
from moe_dist.tasks import text_metrics
from moe_dist.tasks.row_tasks import prompt_of, read_rows
from moe_dist.tasks.run import run_tasks
from moe_dist.tasks.whole_model import WholeModel

SHIPPED = Path(__file__).parents[2] / "configs" / "tasks"
TASKS = [str(SHIPPED / "sentiment.jsonl"), f"many={SHIPPED}/plurals.jsonl"]


def model_of(*overrides: str) -> WholeModel:
    config = tiny_config("model.vocab_size=258", "model.num_hidden_layers=4", *overrides)
    mesh = mesh_of(config.parallel.ep_size, None, config.parallel.pp_size)
    model = build_part(config, mesh)
    model.initialize(5)
    return WholeModel(model, ByteTokenizer(), mesh, batch_size=3)


def written(folder: Path, *rows: Any) -> str:
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "task.jsonl")


def test_classes_metrics_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    draw = random.Random(2)
    for classes in (2, 3, 7):
        for _ in range(20):
            right = [draw.randrange(classes) for _ in range(draw.randint(1, 30))]
            found = [one if draw.random() < 0.5 else draw.randrange(classes) for one in right]
            assert text_metrics.accuracy(right, found) == accuracy_score(right, found)
            assert text_metrics.macro_f1(right, found) == pytest.approx(f1_score(right, found, average="macro"))


def test_texts_metrics_are_those_of_sacrebleu() -> None:
    import sacrebleu

    draw = random.Random(4)
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "quickly", "."]
    line = lambda: " ".join(draw.choices(words, k=draw.randint(1, 12)))  # noqa: E731
    answers = [line() for _ in range(30)]
    answers[3] = ""
    references = [[line(), answer or line()][: draw.randint(1, 2)] for answer in answers]
    second: list[Any] = [row[1] if len(row) > 1 else None for row in references]
    columns = [[row[0] for row in references], second]
    right = sacrebleu.corpus_bleu(answers, columns).score
    assert text_metrics.bleu(answers, references) == right
    assert text_metrics.chrf(answers, references) == sacrebleu.corpus_chrf(answers, columns).score
    rows = text_metrics.bleu_rows(answers, references)
    assert text_metrics.bleu_of([sum(column) for column in zip(*rows, strict=True)]) == pytest.approx(right)
    hits = sum(answer in row for answer, row in zip(answers, references, strict=True))
    assert text_metrics.exact_match(answers, references) == hits / 30


def test_a_class_is_the_one_whose_name_is_likeliest(tmp_path: Path) -> None:
    """Against a plain forward pass for every choice."""
    model = model_of()
    rows = [json.loads(line) for line in (SHIPPED / "sentiment.jsonl").read_text().splitlines()]
    right, found = [], []
    for row in rows[1:]:
        logs = []
        for choice in rows[0]["choices"]:
            context = f"{row['sentence']}\nThis review is"
            ids = torch.tensor([list((context + choice).encode())])
            with torch.no_grad():
                scores = model.model(ids[:, :-1]).double().log_softmax(-1)[0, len(context) - 1 :]
            logs.append(float(scores.gather(1, ids[0, len(context) :, None]).sum()))
        right.append(row["label"])
        found.append(logs.index(max(logs)))
    result = run_tasks(model, TASKS[:1])["sentiment"]
    from sklearn.metrics import f1_score

    assert 0 < result.metrics["accuracy"] < 1
    assert result.metrics["accuracy"] == sum(a == b for a, b in zip(right, found, strict=True)) / 16
    assert result.metrics["f1"] == pytest.approx(f1_score(right, found, average="macro"))
    for metric, sums in result.sums.items():
        assert sums.value([sum(column) for column in zip(*sums.rows, strict=True)]) == result.metrics[metric]
    # GLUE's own files have no template and no names; texts as labels are names.
    glue = {"sentence1": "a b", "sentence2": "c", "label": 1, "idx": 3}
    bare = written(tmp_path, glue, {"sentence1": "x", "label": 0})
    assert prompt_of(read_rows(bare).rows[0], bare) == "sentence1: a b\nsentence2: c\nlabel:"
    assert run_tasks(model, [bare])["task"].num_rows == 2
    named = written(tmp_path, {"premise": "a", "label": "yes"}, {"premise": "b", "label": "no"})
    assert run_tasks(model, [named])["task"].metrics.keys() == {"accuracy", "f1"}
    assert run_tasks(model, TASKS[:1], 5)["sentiment"].num_rows == 5


def test_answers_are_what_the_engine_writes(tmp_path: Path) -> None:
    model = model_of()
    [answer] = model.on_rank_zero(lambda: model.write([list(b"one cat, many")], [SamplingOptions(max_tokens=6)]))
    file = written(tmp_path, {"max_tokens": 6, "stop": []}, {"prompt": "one cat, many", "reference": answer.strip()})
    assert run_tasks(model, [file])["task"].metrics["exact_match"] == 1.0
    assert run_tasks(model, [file])["task"].metrics["chrf"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([], 'no row with "label"'),
        (["x"], "line 1 is no JSON object"),
        ([{"label": 1, "reference": "a"}], 'line 1: one of "label" and "reference"'),
        ([{"prompt": "a", "label": 1}, {"prompt": "a", "reference": "b"}], "line 2"),
        ([{"prompt": "a", "label": 1.5}], "label=1.5"),
        ([{"prompt": "a", "reference": [3]}], "reference="),
        ([{"choices": [" a", " b"]}, {"prompt": "x", "label": 2}], "label=2 is none of the choices"),
        ([{"prompt": "x", "label": 2}], "fewer than two choices"),
        ([{"template": "{text}"}, {"prompt": "x", "label": 2}, {"prompt": "x", "label": 1}], "no column text"),
        ([{"choices": [" a", ""]}, {"prompt": "x", "label": 0}], "without a token"),
        ([{"prompt": "x", "reference": "y", "max_tokens": 0}], "max_tokens=0"),
        ([{"prompt": "x", "reference": "y", "max_tokens": 4096}], "no room for a prompt"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, rows: list[Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        run_tasks(model_of(), [written(tmp_path, *rows)])


def harness_by(overrides: tuple[str, ...]) -> Any:
    return run_tasks(model_of(*overrides), [str(SHIPPED / "agreement.yaml"), str(SHIPPED / "prose.yaml")], 6)


@pytest.mark.dist
@pytest.mark.proof
def test_the_harness_asks_one_model_over_two_ranks() -> None:
    alone = harness_by(())
    for found in run_ranks(harness_by, 2, ("ep_size=2",)):
        assert found["agreement"] == alone["agreement"]
        assert found["prose"].metrics == pytest.approx(alone["prose"].metrics, rel=1e-5)


def found_by(overrides: tuple[str, ...]) -> Any:
    model = model_of(*overrides)
    results = run_tasks(model, TASKS)
    scores = model.on_rank_zero(lambda: model.score([model.encode_pair("a cat" * n, " sat") for n in range(1, 8)]))
    failures = []
    try:
        run_tasks(model, ["none.jsonl"])
    except ValueError as error:
        failures.append(str(error))
    try:  # raised where a rank computes, on all of them
        model.on_rank_zero(lambda: model.write([[999]], [SamplingOptions(max_tokens=1)]))
    except ValueError as error:
        failures.append(str(error))
    return {name: (one.metrics, one.num_rows) for name, one in results.items()}, scores, failures


@pytest.mark.dist
@pytest.mark.parametrize("layout", [("ep_size=2",), ("pp_size=2", "gradient_accumulation_steps=2"), ()])
def test_every_layout_answers_as_one_process(layout: tuple[str, ...]) -> None:
    alone, scores, failures = found_by(())
    assert len(failures) == 2
    for metrics, logs, failed in run_ranks(found_by, 2, layout):
        assert metrics == alone
        assert [one[0] for one in logs] == pytest.approx([one[0] for one in scores], abs=1e-5)
        assert [one[1] for one in logs] == [one[1] for one in scores]
        assert failed == failures
