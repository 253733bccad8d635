"""Labels that the data brings, in whole runs: learned, or the run says that there is nothing to learn."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from test_epochs import TREE

from moe_dist.train import MoETrainer
from moe_dist.train.trainer import TrainingResult

PROMPT = [7] * 11
ANSWER = {"input_ids": [*PROMPT, 1, 2, 3, 256], "labels": [-100] * 11 + [1, 2, 3, 256]}
SILENT = {"input_ids": [*PROMPT, 1, 2, 3, 256], "labels": [-100] * 15}


def run(folder: Path, rows: Any, train: dict | None = None, **data: Any) -> TrainingResult:
    tree = TREE | {
        "data": {"text_field": "input_ids", "max_seq_length": 15, "validation_split": 0.0, "shuffle": False} | data,
        "train": {"per_device_train_batch_size": 1, "max_steps": 3} | (train or {}),
    }
    return MoETrainer(tree, output_dir=folder).train(rows)


def streamed(rows: list) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


def test_labels_reach_the_loss(tmp_path: Path) -> None:
    """The answer is learned and the prompt is not, alike from memory and from a stream."""
    first = run(tmp_path / "memory", [ANSWER] * 4)
    assert run(tmp_path / "stream", streamed([ANSWER] * 4), streaming=True, source="memory").losses == first.losses
    plain = run(tmp_path / "plain", [{"input_ids": ANSWER["input_ids"]}] * 4)
    assert abs(plain.losses[-1] - first.losses[-1]) > 1e-3


def test_conversations_are_trained_as_their_tokens_and_labels(tmp_path: Path) -> None:
    """One way from rows to samples: written out by hand as bytes, 256 for the end, they give the same losses."""
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    ids = [*b"User: q\nAssistant:", *b" a", 256]
    by_hand = {"input_ids": ids, "labels": [-100] * (len(ids) - 3) + ids[-3:]}
    options = {"packing": False, "max_seq_length": 24}
    first = run(tmp_path / "talk", [talk] * 4, text_field="text", **options)
    assert first.losses == run(tmp_path / "hand", [by_hand] * 4, **options).losses
    assert first.losses[-1] < first.losses[0]


def test_nothing_to_learn_is_no_loss_of_zero(tmp_path: Path) -> None:
    """Before the first step. Seen to fail with `loss 0.0000` and the exit code of success."""
    with pytest.raises(ValueError, match="the training data has no label: of 60 tokens every one is ignored"):
        run(tmp_path, [SILENT] * 4)
    with pytest.raises(ValueError, match="training data has no label"):
        run(tmp_path, [[256]] * 40)


def test_nothing_to_evaluate_on_is_said_before_the_first_step(tmp_path: Path) -> None:
    texts = tmp_path / "held_out.jsonl"
    silent, answer = (f'{{"input_ids": {row["input_ids"]}, "labels": {row["labels"]}}}\n' for row in (SILENT, ANSWER))
    texts.write_text(silent * 3)
    given = {"validation_path": str(texts), "source": "memory"}
    with pytest.raises(ValueError, match="the validation set has no label: of 45 tokens"):
        run(tmp_path / "run", [ANSWER] * 4, **given)
    texts.write_text(silent * 3 + answer)
    assert run(tmp_path / "whole", [ANSWER] * 4, **given).best_eval_loss is not None
    with pytest.raises(ValueError, match=r"no label among the 2 samples of train\.eval_batches"):
        run(tmp_path / "few", [ANSWER] * 4, {"eval_batches": 2}, **given)


def test_a_stream_without_labels_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without one is a warning; a run of them, or many in a row, an error."""
    silent = run(tmp_path / "silent", streamed([SILENT] * 4), streaming=True, source="memory")
    assert silent.failed
    assert "3 steps in a row without a single label" in silent.reason
    assert silent.checkpoint is None
    monkeypatch.setattr("moe_dist.train.stopping.UNLABELLED_STEPS", 2)
    many = run(tmp_path / "many", streamed([ANSWER, *[SILENT] * 4]), {"max_steps": 5}, streaming=True, source="memory")
    assert (many.failed, many.steps) == (True, 3)


def test_one_step_without_labels_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moe_dist"):
        result = run(tmp_path, [ANSWER, SILENT, ANSWER])
    assert not result.failed
    assert result.final_loss > 0
    (said,) = (record.getMessage() for record in caplog.records if "has a label" in record.getMessage())
    assert said.startswith("step 2: ")
