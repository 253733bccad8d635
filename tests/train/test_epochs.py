"""Epochs are counted in samples: the batch, the accumulation and the data may change between two starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from patches import Replace

from moe_dist.config import OptimizerConfig, TrainConfig
from moe_dist.monitor.sinks.multi_sink import Sinks
from moe_dist.train import MoETrainer
from moe_dist.train.schedule import learning_rate
from moe_dist.train.stopping import Pace, Stopping

LENGTH = 16
ROWS = [[(7 * row + place) % 250 for place in range(LENGTH - 1)] for row in range(24)]  # a sample each, with its end
TREE: dict[str, Any] = {
    "model": {
        "vocab_size": 272,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "moe_intermediate_size": 8,
        "num_experts": 2,
        "num_experts_per_tok": 2,
    },
    "data": {"max_seq_length": LENGTH, "validation_split": 0.0},
    "train": {"per_device_train_batch_size": 2, "num_train_epochs": 1},
    "optimizer": {"lr_scheduler_type": "linear", "learning_rate": 1e-2, "warmup_steps": 3},
    "checkpoint": {"save_steps": 4, "background": False, "allow_config_change": True},
    "monitor": {"tensorboard": False, "progress": "none", "logging_steps": 1},
}


def run(folder: Path, rows: list = ROWS, train: dict | None = None, **sections: dict) -> MoETrainer:
    tree = {**TREE, **{name: TREE[name] | keys for name, keys in sections.items()}}
    tree["train"] = TREE["train"] | (train or {})
    trainer = MoETrainer(tree, output_dir=folder)
    trainer.train(rows)
    return trainer


def rates(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["learning_rate"] for row in rows if row["kind"] == "train"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert run(folder).parts.loader.epoch == 1.0
    assert len(rates(folder)) == 12
    return folder


@pytest.mark.parametrize(
    ("step", "train"),
    [
        (4, {"per_device_train_batch_size": 4}),
        (4, {"per_device_train_batch_size": 1}),
        (8, {"gradient_accumulation_steps": 2}),
    ],
    ids=["larger", "smaller", "accumulated"],
)
def test_another_batch_ends_at_the_same_sample(
    tmp_path: Path, straight: Path, replace: Replace, step: int, train: dict
) -> None:
    """Exactly one epoch, on the one curve of the learning rate, and said in one line.

    Seen to fail with the steps of an epoch counted anew by today's batch and held against the steps done: the run ended
    at epoch 1.67 or 0.67, and the rate jumped.
    """
    said: list[str] = []
    replace(Sinks, "message", lambda self, text: said.append(text))
    known = rates(straight)
    resume = {"resume": str(straight / f"checkpoint-{step}")}
    trainer = run(tmp_path / "run", train=train, checkpoint=resume)
    assert trainer.parts.loader.samples_consumed == 24
    batch = trainer.parts.loader.global_batch_size
    found = rates(tmp_path / "run")
    assert len(found) == (24 - 2 * step) // batch
    for number, rate in found.items():
        consumed = 2 * step + (number - step - 1) * batch
        if consumed % 2 == 0:  # a step of the straight run begins here too
            assert rate == pytest.approx(known[consumed // 2 + 1], rel=1e-12)
    (line,) = (text for text in said if "epochs are counted in samples" in text)
    assert f"global batch size={batch} (saved with 2)" in line
    assert f"the run ends at step {trainer.parts.counters.step}, not 12" in line


def test_twice_another_batch(tmp_path: Path, straight: Path) -> None:
    """The unit of the schedule is that of the first start, through every later one."""
    first = {"resume": str(straight / "checkpoint-4")}
    run(tmp_path / "run", train={"per_device_train_batch_size": 4, "num_train_epochs": 0.5}, checkpoint=first)
    trainer = run(tmp_path / "run", train={"per_device_train_batch_size": 1})
    assert trainer.parts.loader.epoch == 1.0
    found, known = rates(tmp_path / "run"), rates(straight)
    assert found[6] == pytest.approx(known[7], rel=1e-12)  # each after 12 samples


def test_another_length_keeps_the_epoch(tmp_path: Path, straight: Path) -> None:
    """Samples half as long are twice as many: what has been read stays a third of the data.

    Seen to fail with the number of samples taken over: a third of the data counted as a sixth, and the run trained on
    longer than an epoch.
    """
    resume = {"resume": str(straight / "checkpoint-4")}
    trainer = run(tmp_path / "run", data={"max_seq_length": LENGTH // 2}, checkpoint=resume)
    assert (trainer.parts.loader.epoch, trainer.parts.loader.samples_consumed) == (1.0, 48)
    assert rates(tmp_path / "run")[5] == pytest.approx(rates(straight)[5], rel=1e-12)


def test_steps_stay_steps(tmp_path: Path, straight: Path) -> None:
    """With max_steps the batch moves neither the end nor the rate."""
    for name, train in (("same", {}), ("other", {"per_device_train_batch_size": 4})):
        resume = {"resume": str(straight / "checkpoint-4")}
        run(tmp_path / name, train={**train, "max_steps": 7}, checkpoint=resume)
    assert rates(tmp_path / "same") == rates(tmp_path / "other")
    assert list(rates(tmp_path / "other")) == [5, 6, 7]


def test_a_checkpoint_from_before_the_unit_was_saved(straight: Path) -> None:
    stopping = Stopping(TrainConfig(num_train_epochs=1), Pace(8, 24))
    stopping.load_state_dict({"best_loss": None, "evaluations_without_improvement": 0}, saved=Pace(2, 24))
    assert stopping.position(4, 8) == (4.0, 12)
    stopping.go_on(4, 8)
    assert stopping.max_steps == 6


@pytest.mark.parametrize(
    ("epochs", "num_samples", "batch", "steps"),
    [(1.0, 24, 2, 12), (2.0, 10, 4, 5), (0.1, 30, 1, 3), (1.1, 100, 10, 11), (1e-6, 5, 8, 1), (0.7, 10, 1, 7)],
)
def test_steps_of_a_run(epochs: float, num_samples: int, batch: int, steps: int) -> None:
    """As many as reach the last sample, by exact arithmetic: 1.1 * 100 is 110.00000000000001 to a processor."""
    assert Stopping(TrainConfig(num_train_epochs=epochs), Pace(batch, num_samples)).max_steps == steps


def test_warmup_is_rounded_exactly() -> None:
    """0.07 of 100 steps are 7. Seen to fail with the product of floats, which is 7.000000000000001, rounded up."""
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.07, lr_scheduler_type="linear")
    assert learning_rate(config, 7, 100) == 1.0
