"""Runs on preferences: what they measure once, what they tell, and how they go on."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import found_at

from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.checkpoint.tools.inspecting import Tensors
from moe_dist.train import MoETrainer
from moe_dist.train.result import TrainingResult

ROWS = [
    {"prompt": f"say {n % 5}+{n % 7}: ", "chosen": f"{n % 5 + n % 7}!", "rejected": f"no {n % 3}"} for n in range(30)
]
MODEL = {
    "vocab_size": 258,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "save_steps": 2,
    "eval_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 2,
    "progress": "none",
    "tensorboard": False,
}


def run(folder: Path, rows: list[Any] = ROWS, lora: int = 0, **options: Any) -> TrainingResult:
    data = {"source": "memory", "format": "preference", "max_seq_length": 64, "validation_split": 0.2}
    config = {"model": MODEL, "data": data, "lora": {"r": lora}}
    return MoETrainer(config, training_config=TRAINING | options, output_dir=folder).train(rows)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def tensors_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = found_at(folder, step)
    tensors = Tensors(found, found.storage.manifest(step), Keys())
    return {name: tensors.read(name) for name in tensors.names()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose reference is the start; not to be changed."""
    folder = tmp_path_factory.mktemp("dpo") / "run"
    run(folder, tensorboard=True)
    return folder


def test_the_chosen_answers_win(trained: Path) -> None:
    """From a loss of ln 2, where nothing differs from the reference, on answers never trained on too."""
    first, *_, last = records(trained, "train")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert (first["reward_margin"], first["reward_accuracy"]) == (pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1))
    assert last["loss"] < 0.5
    assert last["reward_margin"] == pytest.approx(last["rewards_chosen"] - last["rewards_rejected"])
    assert last["reward_accuracy"] == 1.0
    evals = records(trained, "eval")
    assert evals[-1]["loss"] < 0.5
    assert evals[-1]["reward_accuracy"] == 1.0
    assert evals[-1]["perplexity"] is None
    assert evals[-1]["unigram_loss"] is None
    held_out = len(load_file(trained / "reference.safetensors")["validation"])
    assert evals[-1]["tokens"] == held_out
    # Of an interval the mean over its pairs, and each step's own.
    assert len(last["steps"]["reward_margin"]) == 2
    low, high = sorted(last["steps"]["reward_margin"])
    assert low <= last["reward_margin"] <= high


def test_every_sink_has_the_rewards(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (trained / "tb").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    last, final = records(trained, "train")[-1], records(trained, "eval")[-1]
    for name, tag in (("reward_margin", "rewards/margins"), ("reward_accuracy", "rewards/accuracies")):
        assert events.Scalars(tag)[-1].value == pytest.approx(last["steps"][name][-1])
        assert events.Scalars(f"eval/{tag.replace('/', '_')}")[-1].value == pytest.approx(final[name])
    run(tmp_path / "run", max_steps=1, eval_steps=1, save_steps=0, progress="plain")
    said = capsys.readouterr().out
    assert "step: 1/1  loss: 0.6931  margin: 0.0000  accuracy: " in said
    assert "reference: log-probabilities of 30 pairs under the start, measured in" in said
    (line,) = [line for line in said.splitlines() if line.startswith("eval step: 1")]
    assert "  margin: " in line
    assert "  pairs: " in line
    assert "perplexity" not in line


def test_a_run_goes_on_bit_for_bit_with_the_reference_of_its_start(trained: Path, tmp_path: Path) -> None:
    """Seen red: measured anew, of the weights that it goes on from."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    run(tmp_path / "run")
    again, wanted = (tensors_of(folder, 4) for folder in (tmp_path / "run", trained))
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_a_run_does_not_go_on_without_it(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    kept = tmp_path / "run" / "reference.safetensors"
    found = load_file(kept)
    kept.unlink()
    with pytest.raises(
        CheckpointError, match=r"dpo\.reference=start: .*reference\.safetensors is not there, and the weights"
    ):
        run(tmp_path / "run", max_steps=6)
    save_file(found, kept, {"weights": "others"})
    with pytest.raises(CheckpointError, match="is of other weights"):
        run(tmp_path / "run", max_steps=6)
    kept.write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(tmp_path / "run", max_steps=6)
    shutil.copy(trained / "reference.safetensors", kept)
    with pytest.raises(CheckpointError, match=r"is of other pairs \(train"):
        run(tmp_path / "run", ROWS[:-1], max_steps=6, on_change="warn", allow_config_change=True)


def test_what_has_been_measured_serves_a_start_with_the_same_weights(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is measured anew of others. A run that starts afresh keeps a copy beside what it sets aside."""
    shutil.copytree(trained, tmp_path / "run")
    said = []
    for options in ({}, {"seed": 7}):
        run(tmp_path / "run", max_steps=1, resume="never", progress="plain", **options)
        said.append(capsys.readouterr().out)
        assert (tmp_path / "run" / "reference.safetensors").is_file()
    assert "log-probabilities of 30 pairs of " in said[0]
    assert "under the start, measured in" in said[1]
    assert all(record.levelno < logging.ERROR for record in caplog.records)


def test_beside_adapters_the_reference_is_the_model_without_them(tmp_path: Path) -> None:
    """Nothing is measured or kept, and a run goes on bit for bit."""
    run(tmp_path / "whole", lora=2)
    assert not (tmp_path / "whole" / "reference.safetensors").exists()
    first, *_, last = records(tmp_path / "whole", "train")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert last["loss"] < 0.68
    run(tmp_path / "parts", lora=2, max_steps=2)
    run(tmp_path / "parts", lora=2)
    again, wanted = (tensors_of(folder, 4) for folder in (tmp_path / "parts", tmp_path / "whole"))
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_model_that_was_trained_on_text_can_be_the_start(lora: int, tmp_path: Path) -> None:
    """A checkpoint of another kind of run: the reference is of its weights. Whether of its adapters, too, must be said:
    with the model without them the loss of the first step is not ln 2."""
    text = {"model": MODEL, "data": {"max_seq_length": 64, "source": "memory", "validation_split": 0}}
    text |= {"lora": {"r": lora}}
    options = {name: value for name, value in TRAINING.items() if name != "eval_steps"}
    MoETrainer(text, training_config=options | {"max_steps": 2}, output_dir=tmp_path / "text").train(["abcd " * 99])
    start = {"resume": str(tmp_path / "text" / "checkpoint-2"), "load_optimizer": False, "allow_config_change": True}
    start |= {"on_change": "warn", "max_steps": 3, "eval_steps": 1}
    if lora:
        with pytest.raises(CheckpointError, match=r"dpo\.reference=auto: .* has adapters of another training"):
            run(tmp_path / "run", lora=lora, **start)
        start |= {"reference": "start"}
    run(tmp_path / "run", lora=lora, **start)
    (first, *_) = records(tmp_path / "run", "train")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
