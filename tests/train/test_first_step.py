"""Nobody waits in the dark for the first step."""

from __future__ import annotations

import io
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from patches import Replace

from moe_dist.train import MoETrainer, first_step, parts
from moe_dist.train.step import TrainStep

SETTINGS: dict[str, Any] = {
    "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "moe_intermediate_size": 16},
    "data": {"max_seq_length": 32},
    "train": {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    "monitor": {"progress": "plain", "tensorboard": False},
    "checkpoint": {"save_at_end": False},
}


def test_what_goes_on_is_said_until_the_first_step_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: Replace
) -> None:
    """Seen red without the thread, and with one that is not told of micro-batches."""
    said, waited = io.StringIO(), []
    forward, read = TrainStep._forward, parts.build_datasets

    def wait_for(words: str) -> None:
        """As slow a machine as it takes to say so."""
        until = time.monotonic() + 30
        while words not in said.getvalue():
            assert time.monotonic() < until, f"{words!r} not in ...{said.getvalue()[-200:]!r}"
            time.sleep(0.005)
        waited.append(words)

    def slow_read(*arguments: Any) -> Any:
        wait_for("  reading the data\n")
        return read(*arguments)

    def slow_forward(self: TrainStep, *arguments: Any) -> Any:
        if len(waited) < 4:
            wait_for(f"  step 1: micro-batch {len(waited)} of 3\n")
        else:
            assert "first-step" not in {thread.name for thread in threading.enumerate()}
        return forward(self, *arguments)

    monkeypatch.setattr(first_step, "FIRST", 0.01)
    monkeypatch.setattr(first_step, "BETWEEN", 0.01)
    monkeypatch.setattr(sys, "stdout", said)
    replace(parts, "build_datasets", slow_read)
    replace(TrainStep, "_forward", slow_forward)
    MoETrainer(SETTINGS, output_dir=tmp_path).train(["some words to learn " * 60])
    assert len(waited) == 4
    lines = [line for line in said.getvalue().splitlines() if "micro-batch" in line]
    assert all(re.fullmatch(r"\d:\d\d  step 1: micro-batch \d of 3", line) for line in lines)


def test_a_start_that_fails_leaves_no_thread(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches no file"):
        MoETrainer({"data": {"source": "text", "path": str(tmp_path / "*.txt")}}, output_dir=tmp_path / "run").train()
    assert "first-step" not in {thread.name for thread in threading.enumerate()}
