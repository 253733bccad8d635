"""Long runs: detail thins out as a log grows, and what reads it needs no more memory for a longer one."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist.monitor import run_log
from moe_dist.monitor.expert_stats import layer_record
from moe_dist.monitor.health.doctor import findings
from moe_dist.monitor.records import CheckpointRecord, EvalRecord, RunInfo, TrainRecord
from moe_dist.monitor.run_log import read_run
from moe_dist.monitor.sinks import JsonlSink
from moe_dist.monitor.sinks.detail import CELLS, Detail

Make = Callable[..., TrainRecord]
EVEN, COLLAPSED = [100] * 128, [1000] * 8 + [1] * 120


def test_detail_grows_with_the_logarithm_of_a_run(train_record: Make) -> None:
    """Of a million steps of 94 layers x 128 experts, a line every 1,000. Seen to fail with a spacing that does not
    grow.
    """
    layers = [layer_record(layer, EVEN, 0, 1600, {}, 8) for layer in range(94)]
    detail, record = Detail(), train_record(layers=layers, ranks=None)
    due = [step for step in range(1000, 1_000_001, 1000) if detail.is_due(replace(record, step=step))]
    spacing = 94 * 128 / CELLS
    assert due[:90] == list(range(1000, 91_000, 1000))
    assert len(due) < 100 + math.log(10) / spacing + 10
    assert max(after / before for before, after in itertools.pairwise(due[100:])) < 1 + 2 * spacing


def test_few_experts_are_never_thinned(train_record: Make) -> None:
    detail = Detail()
    assert all(detail.is_due(train_record(step)) for step in range(10, 20_000, 10))


def test_detail_steps_fixes_the_distance(train_record: Make) -> None:
    detail = Detail(250)
    assert [step for step in range(100, 1001, 100) if detail.is_due(train_record(step))] == [100, 400, 700, 1000]


def test_trouble_brings_detail_sooner(tmp_path: Path, info: RunInfo, train_record: Make) -> None:
    """What the doctor says of a thinned log is what it would say of a whole one. Seen to fail without SOONER."""

    def log(folder: Path, detail_steps: int | None) -> list[tuple[str, int | None, int | None]]:
        sink = JsonlSink(folder / "metrics.jsonl", detail_steps)
        sink.open(info)
        for number in range(60):
            load = COLLAPSED if number >= 30 else EVEN
            layers = [layer_record(layer, load, 0, sum(load) // 8, {}, 8) for layer in range(94)]
            loss = 6.0 - number / 20
            sink.train(train_record(1_000_000 + 1000 * number, layers=layers, loss=loss, max_steps=None))
        sink.close()
        found = findings(read_run(folder))
        return [(one.kind, one.step, one.layer) for one in found if one.severity != "info"]

    whole = log(tmp_path / "whole", 1)
    assert {kind for kind, _, _ in whole} >= {"collapse"}
    assert log(tmp_path / "thinned", None) == whole
    size, thinned = ((tmp_path / name / "metrics.jsonl").stat().st_size for name in ("whole", "thinned"))
    assert thinned < size / 5


def test_what_is_kept_has_the_extremes(
    tmp_path: Path, info: RunInfo, train_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 lines read into at most 100. Seen to fail with every other row kept."""
    monkeypatch.setattr(run_log, "MOST_ROWS", 50)
    monkeypatch.setattr(run_log, "MOST_DETAILS", 30)
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.open(info)
    odd = {334: {"loss": 9.0}, 501: {"loss": math.nan}, 638: {"grad_norm": 77.0}, 777: {"tokens_per_second": 5.0}}
    seconds = 0.0
    for number in range(1000):
        usual = {"loss": 3.0 - number / 1000, "tokens": 1000 * (number + 1)}
        record = train_record(number + 1, **(usual | odd.get(number, {})))
        seconds += 1000 / record.tokens_per_second
        sink.train(record)
        sink.evaluation(EvalRecord(number + 1, 1.0 if number == 444 else 2.0, 9.0, 1000, 1.0))
        sink.checkpoint(CheckpointRecord(number + 1, 1.0, 0.1, 1, "x", number != 555, "disk full"))
    sink.close()
    run = read_run(tmp_path)
    for kept in (run.train, run.evals, run.checkpoints, run.layer_rows):
        assert len(kept) <= 100
    assert {number + 1 for number in odd} < {row["step"] for row in run.train}
    assert [row["step"] for row in run.train] == sorted(row["step"] for row in run.train)
    assert (run.train[0]["step"], run.train[-1]["step"]) == (1, 1000)
    assert min(run.evals, key=lambda row: row["loss"])["step"] == 445
    assert [row["step"] for row in run.checkpoints if not row["ok"]] == [556]
    assert run.num_checkpoints == 999
    assert run.training_seconds == pytest.approx(seconds)
    assert sum(bool(row["layers"]) for row in run.train) <= 60
    assert sum(1 for _ in run.rows) == 3001


@pytest.mark.slow
def test_a_large_log_is_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """94 layers x 128 experts, a log of which each line has all: 500 MB of memory and 20 MB of page, at any length."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools/bench")
    long_run = importlib.import_module("long_run")
    long_run.write(tmp_path, 400, 3000, 94, 128)
    for how in ("doctor", "report"):
        found = long_run.read(tmp_path, how)
        assert found["peak_bytes"] < 500e6
    assert found["told"] < 20e6
