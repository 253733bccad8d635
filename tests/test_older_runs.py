"""What an older version wrote is read, reported and gone on from: a run of commit 809b0e3, kept as it was.

`tests/fixtures/run_of_809b0e3` has its run file, its text, its run folder after six steps (one checkpoint, two
evaluations), and `continued.jsonl`: the log after that version itself went on to step 8. Only the host's name is not as
it was.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_dist.checkpoint.config_diff import changes
from moe_dist.config import Config, load_config
from moe_dist.monitor.health.doctor import findings
from moe_dist.monitor.records import CheckpointRecord, EvalRecord, Record, RunInfo, RunSummary, TrainRecord
from moe_dist.monitor.report.page import write_report
from moe_dist.monitor.run_log import read_run
from moe_dist.train import MoETrainer

OLD = Path(__file__).parent / "fixtures" / "run_of_809b0e3"
KINDS: dict[str, type[Record]] = {
    record.kind: record for record in (RunInfo, TrainRecord, EvalRecord, CheckpointRecord, RunSummary)
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to train in, with the run file's relative paths."""
    copy = tmp_path / "old"
    shutil.copytree(OLD, copy)
    monkeypatch.chdir(copy)
    return copy


def test_its_run_file_is_checked(folder: Path) -> None:
    """Seen to fail with `data.path` renamed."""
    command = [sys.executable, "-m", "launcher", "check", "run.yaml", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    told, start = json.loads(done.stdout), rows(folder / "run/metrics.jsonl")[0]
    assert (told["parameters"], told["active_parameters"]) == (start["total_params"], start["active_params"])


@pytest.mark.parametrize("name", ["run/metrics.jsonl", "continued.jsonl"])
def test_every_line_of_its_log_is_a_record(name: str) -> None:
    """No number of it is lost. Seen to fail with `z_loss` renamed."""
    for row in rows(OLD / name):
        now = KINDS[row["kind"]].of(row).to_json()
        for old, new in ((row, now), *zip(row.get("layers", []), now.get("layers", []), strict=True)):
            kept = {key: value for key, value in old.items() if key not in ("time", "layers", "ranks")}
            assert {key: new.get(key) for key in kept} == kept
        assert (row.get("ranks") or {}).items() <= (now.get("ranks") or {}).items()


def test_its_log_is_reported(folder: Path) -> None:
    """Seen to fail with the report asking an old start for its `run_id`, which it does not have."""
    shutil.copy(folder / "continued.jsonl", folder / "run/metrics.jsonl")
    run = read_run(folder / "run")
    assert [row["step"] for row in run.train] == list(range(1, 9))
    assert [row["step"] for row in run.evals] == [3, 6, 8]
    assert (len(run.starts), [row["step"] for row in run.checkpoints]) == (2, [3, 6, 8])
    assert [finding.kind for finding in findings(run) if finding.severity != "info"] == []
    page = write_report([folder / "run"]).read_text()
    assert f"{run.train[0]['loss']:.4f}, {run.train[-1]['loss']:.4f}" in page


@pytest.mark.parametrize(
    ("key", "value", "reads"),
    [
        ("momentum", 0.9, {"optim": "sgd"}),
        ("adam_beta2", 0.95, {"optim": "adamw_torch"}),
        ("adam_epsilon", 1e-6, {"optim": "adamw_torch_fused"}),
        ("num_cycles", 3, {"lr_scheduler_type": "cosine_with_restarts"}),
    ],
)
def test_a_key_that_nothing_reads_is_no_change(key: str, value: float, reads: dict[str, str]) -> None:
    """And one that the optimizer or the schedule reads is refused. Seen to fail with either answer for all."""
    for others, count in ((reads, 1), ({"optim": "adafactor"}, 0)):
        now = Config.model_validate({"optimizer": others}).model_dump(mode="json")
        saved = {**now, "optimizer": {**now["optimizer"], key: value}}
        found = changes(saved, now, 1, 1)
        assert [(change.key, change.free) for change in found] == [(f"optimizer.{key}", False)] * count


def test_its_checkpoint_is_gone_on_from(folder: Path) -> None:
    """Two steps more, with the losses that the old version itself computed.

    Seen to fail with `optimizer.momentum`, whose default was another, compared though AdamW has none, and with the
    moments left out.
    """
    settings = load_config("run.yaml", ("train.max_steps=8", "monitor.progress=none"))
    result = MoETrainer(settings).train()
    assert result.steps == 8
    before = (OLD / "run/metrics.jsonl").read_text()
    log = (folder / "run/metrics.jsonl").read_text()
    assert log.startswith(before)
    ours, theirs = rows(folder / "run/metrics.jsonl"), rows(OLD / "continued.jsonl")
    (start,) = [row for row in ours[before.count("\n") :] if row["kind"] == "run"]
    run = json.loads((OLD / "run/.run.lock").read_text())["run"]
    assert (start["start_step"], start["run_id"]) == (6, run)
    for kind in ("train", "eval"):
        now, then = ({row["step"]: row["loss"] for row in log if row["kind"] == kind} for log in (ours, theirs))
        assert now == pytest.approx(then, abs=1e-5)
