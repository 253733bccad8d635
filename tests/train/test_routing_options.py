"""Options of routing in whole runs: what they compute over restarts, what is counted, what is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from saved import MODEL, TEXTS, TRAINING

from launcher.cli.layout_table import print_report
from moe_dist.checkpoint.config_diff import micro_batch_change
from moe_dist.config import load_mapping
from moe_dist.train import MoETrainer


def trainer(folder: Path, model: dict[str, Any], **options: Any) -> MoETrainer:
    return MoETrainer(
        {}, model_config=MODEL | model, training_config=TRAINING | options | {"logging_steps": 1}, output_dir=folder
    )


def test_a_temperature_goes_on_where_it_was(tmp_path: Path) -> None:
    """Seen to fail with the temperature set by the number of steps of this start."""
    moving: dict[str, Any] = {"router_temperature": 4.0, "router_temperature_steps": 6, "lr_scheduler_type": "constant"}
    straight = trainer(tmp_path / "straight", {}, max_steps=4, **moving)
    wanted = straight.train(TEXTS).losses
    trainer(tmp_path / "parts", {}, max_steps=2, **moving).train(TEXTS)
    second = trainer(tmp_path / "parts", {}, max_steps=4, **moving)
    assert second.train(TEXTS).losses == wanted[2:]
    for one in (straight, second):
        assert {moe.router.logits_temperature for moe in one.model.moe_layers()} == {2.0}
    assert trainer(tmp_path / "none", {}, max_steps=4, lr_scheduler_type="constant").train(TEXTS).losses != wanted


def test_tokens_whose_gate_fails_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And training goes on. Seen to fail without the option: stopped at step 1, loss nan."""
    failing = {"router": "moe_dist.verify.examples:FailingRouter"}
    assert trainer(tmp_path / "without", failing, max_steps=2).train(TEXTS).failed
    result = trainer(tmp_path / "run", failing, max_steps=2, fallback_expert=1).train(TEXTS)
    assert (result.failed, result.steps) == (False, 2)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    for record in records:
        for layer in record["layers"]:
            failed = layer["fallback_tokens"]
            assert 0 < failed < 64
            assert sum(layer["tokens_per_expert"]) == 2 * 64 - failed  # two experts each, but for those
            assert layer["tokens_per_expert"][1] >= failed
    assert caplog.text.count("were routed by the fallback: the router's outputs are not finite, in ") == 1


def test_expert_choice_says_that_it_is_not_causal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING, logger="moe_dist"):
        result = trainer(tmp_path, {"router": "expert_choice"}, max_steps=2, bias_update_rate=0.0).train(TEXTS)
    assert result.steps == 2
    assert "model.router=expert_choice is not causal" in caplog.text
    print_report(load_mapping({"model": MODEL | {"router": "expert_choice"}}), 1)
    assert "model.router=expert_choice is not causal" in capsys.readouterr().out


def test_expert_choice_depends_on_the_micro_batch() -> None:
    """Seen to fail with the load-balancing loss alone looked at."""

    def tree(size: int, router: str) -> dict[str, Any]:
        settings = {"model": {"router": router}, "balance": {"aux_loss_scope": "sequence"}}
        return load_mapping(settings | {"train": {"per_device_train_batch_size": size}}).model_dump(mode="json")

    said = micro_batch_change(tree(4, "expert_choice"), tree(8, "expert_choice"))
    assert said is not None
    assert said.startswith("train.per_device_train_batch_size=8 (saved with 4) changes which tokens experts choose")
    assert micro_batch_change(tree(4, "expert_choice"), tree(4, "expert_choice")) is None
    assert micro_batch_change(tree(4, "topk"), tree(8, "topk")) is None
