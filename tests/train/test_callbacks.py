"""Callbacks: what they are told, what they may ask for, and what one that raises does."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks
from saved import MODEL, TEXTS, TRAINING
from tiny import mesh_of

from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.train import Callback, MoETrainer, Request, RunState, TrainingResult
from moe_dist.train.callbacks import CallbackError


class Recorder(Callback):
    """Notes every event, and asks for what it is told to ask for: (event, step) -> request."""

    def __init__(self, asks: dict[tuple[str, int], Request] | None = None) -> None:
        self.events: list[tuple[str, int]] = []
        self.states: list[RunState] = []
        self.records: list[Any] = []
        self.result: TrainingResult | None = None
        self.asks = asks or {}

    def _note(self, event: str, run: RunState, record: Any = None) -> Request | None:
        self.events.append((event, run.step))
        self.states.append(run)
        self.records.append(record)
        return self.asks.get((event, run.step))

    def on_run_begin(self, run: RunState) -> Request | None:
        return self._note("begin", run)

    def on_step_end(self, run: RunState) -> Request | None:
        return self._note("step", run)

    def on_log(self, run: RunState, record: Any) -> Request | None:
        return self._note("log", run, record)

    def on_evaluate(self, run: RunState, record: Any) -> Request | None:
        return self._note("evaluate", run, record)

    def on_save(self, run: RunState, record: Any) -> Request | None:
        return self._note("save", run, record)

    def on_run_end(self, run: RunState, result: TrainingResult) -> None:
        self._note("end", run, result)


def trained(folder: Path, given: list[Callback], **options: Any) -> TrainingResult:
    training = TRAINING | {"background": False} | options
    trainer = MoETrainer(model_config=MODEL, training_config=training, output_dir=folder, callbacks=given)
    return trainer.train(TEXTS)


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row.get("kind") == kind]


def test_what_a_callback_is_told(tmp_path: Path) -> None:
    one = Recorder()
    result = trained(tmp_path, [one], eval_steps=3, save_steps=2, max_steps=4, logging_steps=2)
    assert one.events == [
        *(("begin", 0), ("log", 1), ("step", 1)),
        *(("log", 2), ("save", 2), ("step", 2)),
        *(("evaluate", 3), ("step", 3)),
        *(("log", 4), ("save", 4), ("step", 4)),
        *(("evaluate", 4), ("end", 4)),
    ]
    told = dict(zip(one.events, zip(one.states, one.records, strict=True), strict=True))
    assert math.isnan(told["begin", 0][0].loss)
    lines = rows(tmp_path, "train")
    for line in lines:
        state, record = told["log", line["step"]]
        assert (record.loss, record.tokens, record.grad_norm) == (line["loss"], line["tokens"], line["grad_norm"])
        assert (state.loss, state.tokens, state.epoch, state.learning_rate) == (
            line["loss"], line["tokens"], line["epoch"], line["learning_rate"],
        )  # fmt: skip
        assert [layer.tokens_per_expert for layer in record.layers] == [
            layer["tokens_per_expert"] for layer in line["layers"]
        ]
    assert [told["step", step][0].loss for step in (1, 2, 3, 4)] == result.losses
    assert told["step", 3][0].stopping is None
    assert told["step", 4][0].stopping == "all 4 steps done"
    assert told["evaluate", 3][1].loss == rows(tmp_path, "eval")[0]["loss"]
    assert told["save", 2][1].path.endswith("checkpoint-2")
    assert told["end", 4][1] == result
    with pytest.raises(AttributeError):
        told["step", 1][0].loss = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("event", ["begin", "step", "log", "evaluate", "save"])
def test_a_stop_takes_effect_after_the_same_step(tmp_path: Path, event: str) -> None:
    """What was not logged yet is logged, the step is saved, the reason is told."""
    step = 0 if event == "begin" else 4 if event == "log" else 3
    one = Recorder({(event, step): Request(stop="it is enough")})
    result = trained(tmp_path, [one], eval_steps=3, save_steps=3, logging_steps=4, max_steps=9)
    assert (result.steps, result.reason, result.failed, result.signal) == (step, "it is enough", False, None)
    assert LocalStorage(tmp_path / "checkpoints").candidates()[-1:] == [step]
    if step:
        assert rows(tmp_path, "train")[-1]["step"] == step
        assert sum(row["tokens"] for row in rows(tmp_path, "train")[-1:]) == one.states[-1].tokens


def test_an_evaluation_and_a_checkpoint_when_asked_for(tmp_path: Path) -> None:
    """Seen to fail with a request that is answered after the next step."""
    one = Recorder({("step", 2): Request(evaluate=True, save=True)})
    trained(tmp_path, [one], save_steps=0, max_steps=4)
    assert [event for event in one.events if event[0] in ("evaluate", "save")] == [
        *(("evaluate", 2), ("save", 2)),
        *(("evaluate", 4), ("save", 4)),
    ]
    assert LocalStorage(tmp_path / "checkpoints").candidates() == [2, 4]
    assert LocalStorage(tmp_path / "checkpoints").manifest(2).metrics == {
        "eval_loss": rows(tmp_path, "eval")[0]["loss"]
    }


class Raises(Callback):
    def on_step_end(self, run: RunState) -> None:
        if run.step == 2:
            raise KeyError("no such thing")


def test_one_that_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    named = r"callback test_callbacks:Raises\.on_step_end: KeyError: 'no such thing' \(.*test_callbacks\.py:\d+\)"
    with pytest.raises(CallbackError, match=named + "; train.on_callback_error=warn"):
        trained(tmp_path / "raise", [Raises()])
    caplog.clear()
    after = Recorder()
    with caplog.at_level(logging.WARNING, "moe_dist"):
        result = trained(tmp_path / "warn", [Raises(), after], on_callback_error="warn")
    assert result.steps == 6
    assert [event for event in after.events if event[0] == "step"] == [("step", step) for step in range(1, 7)]
    assert len([r for r in caplog.records if "no such thing" in r.getMessage()]) == 1


def test_names_in_the_run_file(tmp_path: Path) -> None:
    """They are called; what cannot be imported, or is no callback, is named before anything is built."""
    with pytest.raises(CallbackError, match="test_callbacks:Raises"):
        trained(tmp_path / "a", [], callbacks=["test_callbacks:Raises"])
    for name, words in (
        ("not_there:Callback", "train.callbacks=not_there:Callback: cannot be imported"),
        ("pathlib:PurePath", "a subclass of moe_dist.train.callbacks.Callback is needed"),
    ):
        with pytest.raises(ValueError, match=words):
            trained(tmp_path / "b", [], callbacks=[name])
    assert not list((tmp_path / "b").glob("metrics.jsonl"))


class OnOneRank(Callback):
    """Only the last rank asks, and differently at each of two steps."""

    def on_step_end(self, run: RunState) -> Request | None:
        if run.rank != run.world_size - 1:
            return None
        return {2: Request(save=True), 3: Request(stop="rank 1 has seen enough")}.get(run.step)


def with_one_that_asks(folder: str) -> tuple[int, str, list[int]]:
    config = MoETrainer(model_config=MODEL, training_config=TRAINING | {"save_steps": 0}, output_dir=folder).config
    config.parallel.ep_size = dist.get_world_size()
    result = MoETrainer(config, mesh=mesh_of(config.parallel.ep_size), callbacks=[OnOneRank()]).train(TEXTS)
    return result.steps, result.reason, LocalStorage(Path(folder) / "checkpoints").candidates()


@pytest.mark.dist
def test_one_rank_that_asks_is_enough(tmp_path: Path) -> None:
    """Seen to hang with what a rank alone has asked for done by it alone."""
    assert run_ranks(with_one_that_asks, 2, str(tmp_path)) == [(3, "rank 1 has seen enough", [2, 3])] * 2
