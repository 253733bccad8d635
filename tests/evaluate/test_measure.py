"""Losses equal those of `transformers` on the exported model and those of the run's own log, on one rank and on two."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Say
from patches import Replace
from ranks import run_ranks
from tiny import mesh_of, tiny_config

from moe_dist.data.corpus import documents_from
from moe_dist.data.loader import Chosen
from moe_dist.data.packing import pack
from moe_dist.data.tokenizer import ByteTokenizer
from moe_dist.evaluate import measure as measuring
from moe_dist.evaluate.expert_study import study
from moe_dist.evaluate.latency import measure_latency
from moe_dist.evaluate.measure import Measured, measure
from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.parallel.parallelize import build_part
from moe_dist.pretrained.inference import find_model, open_model
from moe_dist.train import MoETrainer
from moe_dist.train.callbacks import Callback, RunState

transformers = pytest.importorskip("transformers")

MODEL = {
    "vocab_size": 264,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
OPTIONS = {
    "max_seq_length": 32,
    "max_steps": 4,
    "save_steps": 2,
    "eval_steps": 2,
    "learning_rate": 1e-2,
    "progress": "none",
    "tensorboard": False,
    "validation_split": 0.3,
    "seed": 3,
}
TEXTS = [f"def f{i}(x):\n    return x * {i}\n" * (2 + i % 5) for i in range(20)]
PROSE, CODE = "Émile wrote a short line. And another one.", "x = 1\nfor y in range(9):\n    print(y)\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs") / "run"
    MoETrainer(
        {},
        model_config=MODEL,
        training_config=OPTIONS,
        output_dir=place,
    ).train(TEXTS)
    return place


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "prose.txt").write_text(PROSE)
    (tmp_path / "code.py").write_text(CODE)
    return [f"prose={tmp_path}/prose.txt", f"code={tmp_path}/code.py"]


def words(files: list[str]) -> list[str]:
    return [word for file in files for word in ("--data", file)]


def test_losses_are_those_of_transformers(run: Path, files: list[str], tmp_path: Path, say: Say) -> None:
    assert say("export", run, "--output", tmp_path / "hf", "--no-logits").code == 0
    for place in (run, tmp_path / "hf"):
        more = ["data.tokenizer=bytes", "data.max_seq_length=32"]
        said = say("evaluate", place, *words(files), "--json", tmp_path / "scores.json", *more)
        assert said.code == 0, said
        found = json.loads((tmp_path / "scores.json").read_text())
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
        ids = [*PROSE.encode(), 256, *CODE.encode(), 256]
        end = len(PROSE.encode()) + 1
        totals = {"prose": [0.0, 0, 0, 0], "code": [0.0, 0, 0, 0]}
        guesses: list[tuple[float, bool]] = []
        for start in range(0, len(ids), 32):  # samples of 32, in which documents do not see each other
            stops = sorted({start, min(max(start, end), start + 32, len(ids)), min(start + 32, len(ids))})
            for first, last in pairwise(stops):
                name = "prose" if first < end else "code"
                targets = ids[first + 1 : last + (last % 32 == 0 and last not in (end, len(ids)))]
                with torch.no_grad():
                    logs = theirs(torch.tensor([ids[first:last]])).logits[0].double().log_softmax(-1)
                guesses += [
                    (float(one.max().exp()), int(one.argmax()) == token)
                    for one, token in zip(logs, targets, strict=False)
                ]
                for place_, token in enumerate(targets):
                    totals[name][0] -= float(logs[place_, token])
                    totals[name][1] += 1
                    totals[name][2] += int(logs[place_].argmax() == token)
                totals[name][3] += len(bytes(t for t in targets if t < 256).decode(errors="replace").encode())
        assert found["sources"].keys() == totals.keys()
        for name, (loss, count, hits, num_bytes) in totals.items():
            scores = found["sources"][name]
            assert scores["tokens"] == count
            assert scores["loss"] == pytest.approx(loss / count, abs=1e-5)
            assert scores["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-5)
            assert scores["accuracy"] == pytest.approx(hits / count)
            assert scores["bytes"] == num_bytes
            assert scores["bits_per_byte"] == pytest.approx(loss / math.log(2) / num_bytes, rel=1e-5)
        steps = [[guess for guess in guesses if int(guess[0] * 15) == step] for step in range(15)]
        off = sum(abs(sum(sure - hit for sure, hit in step)) for step in steps) / len(guesses)
        assert found["calibration_error"] == pytest.approx(off, abs=1e-5)
        assert [step["tokens"] for step in found["calibration"]] == [len(step) for step in steps if step]
        assert found["loss"] == pytest.approx(sum(t[0] for t in totals.values()) / found["tokens"], abs=1e-5)
        places = found["loss_by_position"]
        assert sum(place["tokens"] for place in places) == found["tokens"]
        assert sum(place["loss"] * place["tokens"] for place in places) == pytest.approx(
            found["loss"] * found["tokens"]
        )
        assert [sum(load) for load in found["expert_load"].values()] == [2 * len(ids)] * 2


def test_what_the_run_holds_out_gives_the_loss_of_its_log(tmp_path: Path, say: Say) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    data = {"source": "jsonl", "path": f"{tmp_path}/texts.jsonl"}
    options = OPTIONS | {"eval_batches": 3}
    MoETrainer({"data": data}, model_config=MODEL, training_config=options, output_dir=tmp_path / "run").train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {row["step"]: row for row in rows if row["kind"] == "eval"}
    for step in (2, 4):
        said = say("evaluate", tmp_path / "run", "--step", step, "--json", "-")
        assert said.code == 0, said
        found = json.loads(said.out)
        assert found["tokens"] == logged[step]["tokens"]
        assert found["loss"] == pytest.approx(logged[step]["loss"], abs=1e-6)


def test_models_side_by_side(run: Path, files: list[str], tmp_path: Path, say: Say) -> None:
    more = ("--json", tmp_path / "both.json", "--report", tmp_path / "page.html")
    said = say("evaluate", run / "checkpoint-2", run, *words(files), *more)
    assert said.code == 0, said
    rows = json.loads((tmp_path / "both.json").read_text())
    for metric, of in rows[1]["differences"].items():
        assert of["paired"]
        assert of["low"] <= of["difference"] <= of["high"]
        assert of["difference"] == pytest.approx(rows[1][metric] - rows[0][metric])
    assert rows[1]["differences"].keys() == {"loss", "perplexity", "accuracy", "bits_per_byte"}
    page = (tmp_path / "page.html").read_text()
    for part in (
        "Differences from run/checkpoint-2",
        "figure-difference",
        "figure-calibration",
        "figure-load",
        "saved",
    ):
        assert part in page
    assert [row["model"] for row in rows] == [f"{run}/checkpoint-2", str(run)]
    assert rows[0]["loss"] != rows[1]["loss"]
    for row in rows:
        assert f"{row['loss']:.4f}" in said.out
        assert f"{row['sources']['prose']['perplexity']:,.2f}" in said.out


def test_a_baseline_that_knows_frequencies_alone(run: Path, files: list[str], tmp_path: Path, say: Say) -> None:
    """Its loss is the entropy of the labels, whatever cuts them; the others are held against it, sample by sample."""
    more = ("--baseline", "unigram", "--json", tmp_path / "both.json", "--report", tmp_path / "page.html")
    said = say("evaluate", run / "checkpoint-2", run, *words(files), *more)
    assert said.code == 0, said
    rows = json.loads((tmp_path / "both.json").read_text())
    assert [row["model"] for row in rows] == ["unigram", f"{run}/checkpoint-2", str(run)]
    ids = [*PROSE.encode(), 256, *CODE.encode(), 256]
    end = len(PROSE.encode()) + 1
    labels = [token for place, token in enumerate(ids) if place not in (0, end)]
    counts = [labels.count(token) for token in set(labels)]
    entropy = -sum(count * math.log(count / len(labels)) for count in counts) / len(labels)
    base = rows[0]
    assert base["tokens"] == rows[1]["tokens"] == len(labels)
    assert base["loss"] == pytest.approx(entropy, abs=1e-5)
    assert base["accuracy"] == pytest.approx(max(counts) / len(labels))
    assert not base.keys() & {"flops", "latency"}
    assert rows[0]["sources"].keys() == rows[1]["sources"].keys()
    for row in rows[1:]:
        assert row["differences"]["loss"]["paired"]
        assert row["differences"]["loss"]["difference"] == pytest.approx(row["loss"] - base["loss"])
    assert "more than unigram" in said.out
    assert "Differences from unigram" in (tmp_path / "page.html").read_text()
    first = say("evaluate", run, "--baseline", run / "checkpoint-2", *words(files), "--json", "-")
    assert [row["model"] for row in json.loads(first.out)] == [f"{run}/checkpoint-2", str(run)]
    tasks = Path(__file__).parents[2] / "configs" / "tasks"
    wrong = say("evaluate", run, "--baseline", "unigram", "--tasks", tasks / "sentiment.jsonl")
    assert (wrong.code, wrong.out, len(wrong.err.splitlines())) == (2, "", 1), wrong
    both = say("evaluate", run, "--baseline", "unigram", "--tasks", tasks / "sentiment.jsonl", *words(files))
    assert both.code == 0, both


def test_latency_is_how_long_a_token_takes(run: Path, files: list[str], say: Say, replace: Replace) -> None:
    """Planted: passes that take longer, the first one longest."""
    step = MoEInferenceEngine.step

    def slow(engine: MoEInferenceEngine) -> Any:
        time.sleep(0.05 if engine._waiting else 0.02)
        return step(engine)

    replace(MoEInferenceEngine, "step", slow)
    said = say("evaluate", run, *words(files), "--json", "-")
    latency = json.loads(said.out)["latency"]
    assert latency["prompt_tokens"] == 128
    assert latency["first_token_seconds"] >= 0.05
    assert latency["seconds_per_token"] >= 0.02


def test_what_cannot_be_measured_is_one_line(run: Path, tmp_path: Path, say: Say) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "empty.txt").write_text("")
    for data, part in (
        ([f"{tmp_path}/a.jsonl", f"{tmp_path}/a.txt"], "two sources are called a"),
        ([f"b={tmp_path}/a.jsonl", f"{tmp_path}/a.txt"], "several kinds"),
        ([f"{tmp_path}/none.txt"], "none.txt"),
        ([f"{tmp_path}/empty.txt"], "no token"),
        ([], "memory"),
    ):
        said = say("evaluate", run, *words(data))
        assert (said.code, said.out) == (2, ""), said
        assert part in said.err, said
        assert len(said.err.splitlines()) == 1


def measured(overrides: tuple[str, ...]) -> tuple[Measured, Any]:
    """The tiny model on two sources, on this rank, and its study of experts."""
    config = tiny_config("model.vocab_size=272", "model.num_hidden_layers=4", *overrides)
    mesh = mesh_of(config.parallel.ep_size, None, config.parallel.pp_size)
    model = build_part(config, mesh)
    model.initialize(5)
    samples = pack(documents_from([PROSE, CODE] * 3), ByteTokenizer(), max_seq_length=16, keep_tail=True)
    chosen = Chosen(samples, range(len(samples)))
    seen = study(model, chosen, ByteTokenizer(), mesh, batch_size=3).to_json()
    waited = measure_latency(model, mesh)
    assert min(waited.first_token_seconds, waited.seconds_per_token) > 0
    return measure(model, chosen, ByteTokenizer(), mesh, batch_size=2), (seen, waited.prompt_tokens)


@pytest.mark.dist
@pytest.mark.parametrize("layout", [("ep_size=2",), ("pp_size=2", "gradient_accumulation_steps=2"), ()])
def test_every_layout_measures_what_one_process_measures(layout: tuple[str, ...]) -> None:
    alone, studied = measured(())
    for found, seen in run_ranks(measured, 2, layout):
        assert found.whole.loss == pytest.approx(alone.whole.loss, abs=1e-6)
        assert (found.whole.num_tokens, found.whole.num_bytes) == (alone.whole.num_tokens, alone.whole.num_bytes)
        assert found.expert_load == alone.expert_load
        assert found.calibration_error == pytest.approx(alone.calibration_error, abs=1e-5)
        for sums, right in zip(found.samples, alone.samples, strict=True):
            assert sums == pytest.approx(right, abs=1e-4)
        assert [row[3] for row in found.by_position] == [row[3] for row in alone.by_position]
        assert seen == studied


def test_a_wrong_sum_is_seen(run: Path, files: list[str], tmp_path: Path, say: Say, replace: Replace) -> None:
    """Planted: losses of both sources in one."""
    right = say("evaluate", run, *words(files), "--json", "-").out
    add = measuring.Totals.add

    def mixed(totals: Any, logits: Any, batch: Any, tokenizer: Any) -> None:
        add(totals, logits, dataclasses.replace(batch, domain_ids=batch.domain_ids * 0), tokenizer)

    replace(measuring.Totals, "add", mixed)
    wrong = say("evaluate", run, *words(files), "--json", "-").out
    assert json.loads(wrong)["sources"].keys() != json.loads(right)["sources"].keys()


def test_a_study_counts_what_routers_decide(run: Path) -> None:
    """Against the routers of a single forward pass, token by token."""
    model, tokenizer = open_model(find_model(str(run)))
    samples = pack(documents_from([CODE]), tokenizer, max_seq_length=64, keep_tail=True)
    found = study(model, Chosen(samples, range(1)), tokenizer, mesh_of(1))
    ids = [*CODE.encode(), 256]
    decided: dict[int, torch.Tensor] = {}
    for moe in model.moe_layers():
        layer = moe.layer
        moe.router.register_forward_hook(lambda m, a, out, layer=layer: decided.update({layer: out.expert_ids_TK}))
    with torch.no_grad():
        model(torch.tensor([ids]))
    assert found.num_tokens == len(ids)
    known = sorted(set(ids))
    for layer in found.layers:
        chosen = decided[layer.layer].tolist()
        for expert in range(4):
            mine = [token for token, experts in zip(ids, chosen, strict=True) if expert in experts]
            assert layer.load_E[expert] == len(mine)
            assert layer.tokens_EU[expert].tolist() == [mine.count(token) for token in known]
            for other in range(4):
                both = sum(expert in experts and other in experts for experts in chosen)
                assert layer.together_EE[expert, other] == both
        shares = layer.tokens_EU.double() / layer.tokens_EU.sum()
        independent = shares.sum(0, keepdim=True) * shares.sum(1, keepdim=True)
        information = (shares * (shares / independent).log2().nan_to_num(0.0, 0.0, 0.0)).sum()
        assert layer.bits == pytest.approx(float(information))
        assert layer.overlap_EE.diagonal().tolist() == pytest.approx([float(load > 0) for load in layer.load_E])


def test_the_experts_command_and_its_page(run: Path, files: list[str], tmp_path: Path, say: Say) -> None:
    said = say("experts", run, *words(files), "--page", tmp_path / "experts.html")
    assert said.code == 0, said
    assert "layer 0: an expert tells" in said.out
    page = (tmp_path / "experts.html").read_text()
    for part in ("Layer 1", "most telling tokens", "figure-overlap-0", "figure-together-1", "figure-sources-0"):
        assert part in page
    study_ = json.loads(say("experts", run, *words(files), "--json").out)
    assert study_["sources"] == ["prose", "code"]
    assert [len(layer["experts"]) for layer in study_["layers"]] == [4, 4]


def test_tokens_with_their_experts(run: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = say("generate", run, "-p", "x =", "--show-experts", "--max-tokens", 3)
    assert plain.code == 0
    assert [line[:3] for line in plain.out.splitlines()] == ["L00", "L01"]
    assert all(len(line.split()) == 1 + 3 + 3 for line in plain.out.splitlines())
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = say("generate", run, "-p", "x =", "--show-experts", "--max-tokens", 3).out
    assert "\x1b[97;48;5;" in coloured


def test_tasks_alone_and_beside_losses(run: Path, files: list[str], tmp_path: Path, say: Say) -> None:
    tasks = Path(__file__).parents[2] / "configs" / "tasks"
    wanted = f"{tasks}/sentiment.jsonl,plural={tasks}/plurals.jsonl"
    said = say("evaluate", run, "--tasks", wanted, "--max-samples", 6, "--json", tmp_path / "scores.json")
    assert said.code == 0, said
    row = json.loads((tmp_path / "scores.json").read_text())
    told = {"model", "tasks", "f1", "bleu", "chrf", "exact_match", "flops", "dense_flops", "flops_saved", "intervals"}
    told |= {"latency"}
    assert row.keys() == told
    assert row["tasks"]["sentiment"].keys() == {"accuracy", "f1", "samples"}
    assert row["f1"] == row["tasks"]["sentiment"]["f1"]
    assert row["tasks"]["plural"]["samples"] == 6
    low, high = row["intervals"]["sentiment: f1"]
    assert 0 <= low <= row["f1"] <= high <= 1
    assert [line.split()[:2] for line in said.out.splitlines()[1:3]] == [["sentiment", "accuracy"], ["sentiment", "f1"]]
    both = say("evaluate", run, "--tasks", wanted, *words(files), "--max-samples", 2, "--json", "-")
    assert both.code == 0, both
    assert json.loads(both.out).keys() >= {"loss", "tasks", "sources"}
    for task, part in (("none.jsonl", "none.jsonl"), (f"{tasks}/sentiment.jsonl,a={tasks}/none.yaml", "NAME=")):
        wrong = say("evaluate", run, "--tasks", task)
        assert (wrong.code, wrong.out, len(wrong.err.splitlines())) == (2, "", 1), wrong
        assert part in wrong.err


def test_a_task_that_goes_away_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')

    class Removes(Callback):
        def on_run_begin(self, run: RunState) -> None:
            (tmp_path / "task.jsonl").unlink()

    options = OPTIONS | {"eval_tasks": [f"{tmp_path}/task.jsonl"], "max_steps": 2}
    trainer = MoETrainer(
        {}, model_config=MODEL, training_config=options, output_dir=tmp_path / "run", callbacks=[Removes()]
    )
    assert trainer.train(TEXTS).losses
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["tasks"] for row in rows if row["kind"] == "eval"] == [{}]
    assert "train.eval_tasks: left out of this evaluation" in (tmp_path / "run" / "train.log").read_text()


def test_tasks_during_a_training_are_those_of_the_command(tmp_path: Path, say: Say) -> None:
    task = str(Path(__file__).parents[2] / "configs" / "tasks" / "sentiment.jsonl")
    options = OPTIONS | {"eval_tasks": [task]}
    MoETrainer({}, model_config=MODEL, training_config=options, output_dir=tmp_path / "run").train(TEXTS)
    plain = MoETrainer({}, model_config=MODEL, training_config=OPTIONS, output_dir=tmp_path / "plain").train(TEXTS)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {row["step"]: row["tasks"] for row in rows if row["kind"] == "eval"}
    assert logged.keys() == {2, 4}
    for step, tasks in logged.items():
        said = say("evaluate", tmp_path / "run", "--step", step, "--tasks", task, "--json", "-")
        row = json.loads(said.out)["tasks"]["sentiment"]
        assert tasks == {"sentiment: accuracy": row["accuracy"], "sentiment: f1": row["f1"]}
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] == plain.losses[-1]  # they leave no trace in training
    wrong = OPTIONS | {"eval_tasks": ["none.jsonl"]}
    trainer = MoETrainer({}, model_config=MODEL, training_config=wrong, output_dir=tmp_path / "wrong")
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        trainer.train(TEXTS)
