"""The main job, shortened: two ranks learn the standard library's source and beat the unigram baseline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.dist
def test_demo_beats_the_unigram_baseline(tmp_path: Path) -> None:
    """`make demo` for 60 half-sized steps instead of two minutes: the result does not depend on the machine's speed."""
    limits = ["max_time=null", "max_steps=60", "eval_steps=30", "sample_tokens=20"]
    limits += ["per_device_train_batch_size=4", "data.limit=1000", "eval_batches=8"]
    command = [sys.executable, "-m", "moe_dist", "train", "configs/demo.yaml", f"output_dir={tmp_path}/run", *limits]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (info,) = [row for row in rows if row["kind"] == "run"]
    (summary,) = [row for row in rows if row["kind"] == "summary"]
    assert info["world_size"] == 2
    assert summary["steps"] == 60
    assert summary["best_eval_loss"] < summary["unigram_loss"] - 0.1
    assert summary["final_loss"] < summary["initial_loss"] - 2
    assert sum(row["all_to_all_share"] > 0 for row in rows if row["kind"] == "train") >= 2
    for said in ("experts", "rank 1", "trainable params", "unigram", "all 60 steps done", "sample after"):
        assert said in done.stdout, f"{said!r} not in\n{done.stdout}"
    assert "Traceback" not in done.stderr
