"""Whole runs in one process: the Python API, determinism, resume, stopping, what is written."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from patches import Replace
from torch._dynamo.utils import counters

from moe_dist.checkpoint.reading import locate
from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.checkpoint.tools.inspecting import digests
from moe_dist.config import ConfigError, load_config
from moe_dist.train import MoETrainer
from moe_dist.train.trainer import TrainingResult

TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * 12 for i in range(24)]
MODEL = {
    "vocab_size": 272,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
TRAINING: dict[str, Any] = {
    "max_seq_length": 32,
    "per_device_train_batch_size": 4,
    "max_steps": 20,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "deterministic": True,
    "progress": "none",
    "tensorboard": False,
    "logging_steps": 5,
    "validation_split": 0.2,
    "bias_update_rate": 1e-3,
    "attention_dropout": 0.1,
}


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was():
    yield
    torch.use_deterministic_algorithms(False)


def run(folder: Path, dataset: Any = TEXTS, **options: Any) -> TrainingResult:
    trainer = MoETrainer({}, model_config=MODEL, training_config=TRAINING | options, output_dir=folder)
    return trainer.train(dataset)


def records(folder: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_learns_and_writes_its_run_folder(tmp_path: Path) -> None:
    result = run(tmp_path / "run", eval_steps=10, sample_tokens=5, tensorboard=True)
    assert result.final_loss < result.initial_loss
    assert result.steps == 20
    assert result.reason == "all 20 steps done"
    assert not result.failed
    folder = result.output_dir
    assert folder == tmp_path / "run"
    assert load_config(folder / "config.yaml").model.hidden_size == 32
    assert (folder / "train.log").exists()
    assert list((folder / "tb").iterdir())
    assert (folder / "checkpoint-20").is_dir()
    rows = records(folder, "train")
    assert [row["step"] for row in rows] == [1, 5, 10, 15, 20]
    assert rows[-1]["loss"] == result.final_loss
    for row in rows:
        for layer in row["layers"]:
            steps = 1 if row["step"] == 1 else 4 if row["step"] == 5 else 5
            assert sum(layer["tokens_per_expert"]) == steps * 4 * 32 * 2
    for name, values in (("loss", result.losses), ("learning_rate", [TRAINING["learning_rate"]] * 20)):
        assert [value for row in rows for value in row["steps"][name]] == values
    assert {name: len(values) for name, values in rows[1]["steps"].items()} == dict.fromkeys(
        ("loss", "learning_rate", "grad_norm", "tokens_per_second"), 4
    )
    assert [row["step"] for row in records(folder, "eval")] == [10, 20]
    (summary,) = records(folder, "summary")
    assert summary["final_loss"] == result.final_loss
    assert len(summary["sample_after"]) >= len("def ")


def test_same_seed_same_losses(tmp_path: Path) -> None:
    """Trap 28, with dropout on. Seen to fail with the noise seed left out of `TrainStep._forward`."""
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    assert first.losses == second.losses
    assert run(tmp_path / "c", seed=7).losses != first.losses


def test_evaluations_and_samples_leave_no_trace(tmp_path: Path) -> None:
    """Trap 29: evaluating after each step and sampling, from an empty prompt too, changes no bit of what is trained.

    Seen to fail with the random state not put back after a sample (dropout is on), and with evaluations counting load.
    """
    quiet = run(tmp_path / "quiet", max_steps=5)
    busy = run(tmp_path / "busy", max_steps=5, eval_steps=1, sample_tokens=3, sample_prompt="")
    assert busy.losses == quiet.losses
    assert weights(tmp_path / "busy" / "checkpoint-5") == weights(tmp_path / "quiet" / "checkpoint-5")
    assert len(records(tmp_path / "busy", "eval")) == 5
    (summary,) = records(tmp_path / "busy", "summary")
    assert isinstance(summary["sample_before"], str)


@pytest.mark.parametrize(
    "options",
    [{}, {"optim": "adafactor"}, {"optim": "sgd"}, {"pure_bf16": True}, {"gradient_accumulation_steps": 2}],
    ids=lambda options: "+".join(options) or "adamw",
)
def test_ten_and_ten_steps_are_twenty(tmp_path: Path, options: dict) -> None:
    """20 steps straight against 10, stop, resume, 10: bitwise equal losses and weights.

    Seen to fail without the data position, without the optimizer's state, and without the selection bias.
    """
    straight = run(tmp_path / "straight", **options)
    run(tmp_path / "two", **options, max_steps=10)
    second = run(tmp_path / "two", **options)
    assert second.losses == straight.losses[10:]
    assert weights(tmp_path / "two" / "checkpoint-20") == weights(tmp_path / "straight" / "checkpoint-20")


def weights(folder: Path) -> dict[str, str]:
    return digests(locate(str(folder), LocalStorage(folder.parent)))


def test_resume_choices(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, max_steps=4, save_steps=2, save_total_limit=2)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert run(folder, max_steps=6, resume=str(folder / "checkpoint-2")).losses[0] > 0
    assert run(folder, max_steps=6).steps == 6  # nothing left to do: ends at once, cleanly
    again = run(folder, max_steps=2, resume="never")
    assert again.steps == 2
    assert not (folder / "checkpoint-6").exists()
    (earlier,) = folder.glob("earlier-*")
    assert (earlier / "checkpoint-6").is_dir()
    with pytest.raises(ValueError, match=r"checkpoint-99: no complete checkpoint there .*checkpoint-2"):
        run(folder, resume=str(folder / "checkpoint-99"))


def test_resume_refuses_another_model(tmp_path: Path) -> None:
    run(tmp_path / "run", max_steps=1)
    other = MODEL | {"num_experts": 8}
    with pytest.raises(ValueError, match=r"model\.num_experts=8 \(saved with 4\)"):
        MoETrainer(model_config=other, training_config=TRAINING, output_dir=tmp_path / "run").train(TEXTS)


def test_an_unfinished_checkpoint_is_ignored(tmp_path: Path) -> None:
    run(tmp_path / "run", max_steps=2)
    (tmp_path / "run" / "checkpoint-9").mkdir()
    (tmp_path / "run" / ".checkpoint-8.tmp").mkdir()
    assert run(tmp_path / "run", max_steps=3).steps == 3


def test_early_stopping(tmp_path: Path) -> None:
    result = run(
        tmp_path / "run",
        max_steps=500,
        eval_steps=1,
        early_stopping_patience=3,
        early_stopping_threshold=0.5,
        learning_rate=1e-6,
    )
    assert "has not improved for 3 evaluations" in result.reason
    assert result.steps == 4
    assert not result.failed


def test_divergence_guard(tmp_path: Path) -> None:
    result = run(tmp_path / "run", divergence_loss=0.5, divergence_epochs=0.2)
    assert result.failed
    assert "train.divergence_loss=0.5" in result.reason
    assert 1 < result.steps < 20


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_non_finite_loss(tmp_path: Path, policy: str, replace: Replace) -> None:
    """A learning rate that blows up: stopped before the update, or skipped, counted and given up on."""
    from moe_dist.train import step

    exact = step.head_cross_entropy
    calls = iter(range(1000))
    replace(step, "head_cross_entropy", lambda *a, **o: exact(*a, **o) * (math.nan if next(calls) in (3, 4) else 1.0))
    result = run(tmp_path / "run", max_steps=8, on_nonfinite=policy)
    if policy == "stop":
        assert result.failed
        assert result.steps == 4
        assert "not finite at step 4" in result.reason
        assert not list((tmp_path / "run").glob("checkpoint-*"))
    else:
        assert not result.failed
        assert result.steps == 8
        assert records(tmp_path / "run", "summary")[0]["skipped_steps"] == 2
        assert math.isfinite(result.final_loss)


def test_time_budget_ends_the_run(tmp_path: Path) -> None:
    result = run(tmp_path / "run", max_steps=-1, num_train_epochs=None, max_time=1.0)
    assert "time budget of 1 s" in result.reason


def test_epochs_end_the_run(tmp_path: Path) -> None:
    result = run(tmp_path / "run", max_steps=-1, num_train_epochs=0.5, per_device_train_batch_size=8)
    assert result.reason == f"all {result.steps} steps done"
    (*_, row) = records(tmp_path / "run", "train")
    assert row["epoch"] == pytest.approx(0.5, abs=8 / 100)


@pytest.mark.slow
def test_torch_compile(tmp_path: Path) -> None:
    """The attention is compiled, in all layers alike, and computes the same."""
    plain = run(tmp_path / "plain", max_steps=3, attention_dropout=0.0)
    counters.clear()
    compiled = run(tmp_path / "compiled", max_steps=3, attention_dropout=0.0, torch_compile=True)
    assert counters["frames"]["ok"] > 0
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)


def test_data_errors_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size=100: the tokenizer bytes needs 258"):
        MoETrainer(model_config=MODEL | {"vocab_size": 100}, training_config=TRAINING, output_dir=tmp_path).train(TEXTS)
    with pytest.raises(ConfigError, match="num_expertz"):
        MoETrainer(model_config={"num_expertz": 4})


def test_unreadable_documents_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "broken.txt").write_bytes(b"good start \xff\xfe bad end" * 50)

    def go(folder: Path, on_error: str) -> TrainingResult:
        data = {"source": "text", "path": str(tmp_path / "*.txt"), "on_error": on_error}
        training = TRAINING | {"max_steps": 1}
        return MoETrainer({"data": data}, model_config=MODEL, training_config=training, output_dir=folder).train()

    assert go(tmp_path / "run", "skip").steps == 1
    assert re.search(r"1 of \d+ documents \(.* %\) could not be read", capsys.readouterr().err)
    assert "broken.txt at 11" in (tmp_path / "run" / "train.log").read_text()
    with pytest.raises(ValueError, match=r"broken\.txt"):
        go(tmp_path / "again", "fail")
