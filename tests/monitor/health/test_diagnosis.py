"""Every finding fires when it should, with its numbers and the key that helps, and a healthy run has none."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import config_reference
from moe_dist.monitor.expert_stats import layer_record
from moe_dist.monitor.health.diagnosis import Diagnosis
from moe_dist.monitor.health.doctor import findings, start_of
from moe_dist.monitor.health.pace import straggler
from moe_dist.monitor.health.rules import Finding
from moe_dist.monitor.records import CheckpointRecord, EvalRecord, RanksRecord, RunInfo, RunSummary, TrainRecord
from moe_dist.monitor.run_log import read_run
from moe_dist.monitor.sinks import JsonlSink

Make = Callable[..., TrainRecord]
INTERVALS = 100


def healthy_loss(number: int, source: random.Random) -> float:
    """A falling loss with the scatter of small batches, 3 %."""
    return (2.0 + 4.0 * math.exp(-number / 15)) * source.gauss(1.0, 0.03)


def diagnosed(records: Sequence[TrainRecord]) -> list[Finding]:
    diagnosis = Diagnosis()
    diagnosis.resumed(start_of({"hosts": ["alpha", "beta", "gamma", "delta"]}))
    return [finding for record in records for finding in diagnosis.train(record)]


@pytest.fixture
def interval(train_record: Make) -> Make:
    """One logging interval of a healthy run."""
    sums = {"aux_loss": 205.0, "z_loss": 400.0, "router_entropy": 200.0, "router_confidence": 90.0}
    balanced = [layer_record(layer, [100, 95, 105, 100], 0, 200, sums, 2) for layer in (0, 3)]

    def make(number: int, **changes: Any) -> TrainRecord:
        return train_record(1 + 10 * number, **({"layers": balanced, "loss": 2.0} | changes))

    return make


def test_a_healthy_run_has_no_finding(interval: Make) -> None:
    """200 runs of 1,000 steps. Seen to fail with spikes at 4 deviations and no floor."""
    for seed in range(200):
        source = random.Random(seed)
        run = [
            interval(
                number,
                loss=healthy_loss(number, source),
                data_wait_share=min(1.0, source.expovariate(20)),
                all_to_all_share=source.uniform(0.1, 0.45),
            )
            for number in range(INTERVALS)
        ]
        assert [str(finding) for finding in diagnosed(run)] == [], seed


def losses(change: Callable[[int, float], float]) -> Callable[[Make], list[TrainRecord]]:
    def made(interval: Make) -> list[TrainRecord]:
        source = random.Random(1)
        return [interval(number, loss=change(number, healthy_loss(number, source))) for number in range(INTERVALS)]

    return made


def fields(count: int, **changes: Any) -> Callable[[Make], list[TrainRecord]]:
    """As healthy, but for `count` intervals from the 40th on."""
    return lambda interval: [
        interval(number, **(changes if 40 <= number < 40 + count else {})) for number in range(INTERVALS)
    ]


def layer(load: list[int], entropy: float = 1.0, confidence: float = 0.45, fallback: int = 0) -> dict[str, Any]:
    tokens = sum(load) // 2
    sums = {"router_entropy": entropy * tokens, "router_confidence": confidence * tokens}
    sums["router_logits_mean_square"] = 900.0 * tokens
    return {"layers": [layer_record(7, load, 0, tokens, sums, 2, fallback_tokens=fallback)]}


def slow_rank(phase: str, rows: int = 100) -> dict[str, Any]:
    phases = {name: [0.1] * 4 for name in ("data", "computing", "all_to_all", "optimizer")}
    phases[phase] = [0.1, 0.1, 0.5, 0.1]
    ranks = RanksRecord([0.3, 0.3, 0.7, 0.3], phases, [100, 100, rows, 100], [0] * 4, [0] * 4)
    return {"stragglers": [2], "ranks": ranks}


# Kind, a run that has it, an interval in which it is found, words, evidence that must be there.
CASES: list[tuple[str, Callable[[Make], list[TrainRecord]], range, str, str]] = [
    ("loss_spike", losses(lambda n, loss: loss * (1.5 if n == 50 else 1)), range(50, 51), "jumped from 2.", "median"),
    ("divergence", losses(lambda n, loss: loss + max(0, n - 50) * 0.1), range(55, 85), "diverges", "lowest"),
    ("flat_loss", losses(lambda n, loss: 5.5 + loss / 100), range(29, 30), "hardly moved", "learning_rate"),
    ("gradient_norm", fields(60, grad_norm=12.0), range(45, 46), "above 10: 12.0 in the middle", "grad_norm"),
    ("loss_not_finite", losses(lambda n, loss: math.nan if n > 60 else loss), range(61, 62), "not finite", ""),
    ("skipped_steps", fields(60, skipped_steps=2), range(40, 41), "2 steps were skipped", "skipped_steps"),
    ("data_starved", fields(60, data_wait_share=0.4), range(42, 43), "40% of the time", "data_wait_share"),
    ("all_to_all_bound", fields(60, all_to_all_share=0.6), range(49, 50), "60% of the time", "all_to_all_bytes"),
    ("low_mfu", fields(60, mfu=0.04), range(49, 50), "4.0% of what they can, most of the", "mfu"),
    ("dead_experts", fields(60, **layer([200, 0, 100, 100])), range(42, 43), "1 of 4 experts", "dead_experts"),
    ("collapse", fields(60, **layer([1000, 1, 1, 1] * 2)), range(42, 43), "has collapsed", "used_share"),
    ("imbalance", fields(60, **layer([450, *[100] * 7])), range(49, 50), "3.1 times its fair", "load_imbalance"),
    ("router_saturated", fields(60, **layer([100] * 4, 1e-3, 0.999)), range(42, 43), "logits of 30", "router_entropy"),
    ("fallback_tokens", fields(60, **layer([110, 100, 100, 100], fallback=10)), range(40, 41), "4.8 % of the", "share"),
    ("straggler", fields(60, **slow_rank("computing")), range(40, 41), "rank 2 on gamma takes 2.3", "lost_seconds"),
    ("straggler", fields(60, **slow_rank("data")), range(40, 41), "most of it waiting for data", "own_seconds"),
    ("straggler", fields(60, **slow_rank("computing", 300)), range(40, 41), "3.0 times the rows", "rows_ratio"),
]  # fmt: skip
# For each kind, something that is nearly it.
NEARLY: dict[str, Callable[[Make], list[TrainRecord]]] = {
    "loss_spike": losses(lambda n, loss: loss * (1.08 if n == 50 else 1)),
    "divergence": losses(lambda n, loss: loss + 0.3 * (50 <= n < 60)),
    "flat_loss": losses(lambda n, loss: 5.5 - 0.01 * n),
    "gradient_norm": fields(4, grad_norm=500.0),
    "loss_not_finite": losses(lambda n, loss: loss),
    "skipped_steps": fields(60, skipped_steps=0),
    "data_starved": fields(2, data_wait_share=0.9),
    "all_to_all_bound": fields(9, all_to_all_share=0.9),
    "low_mfu": fields(60, mfu=None),
    "dead_experts": fields(2, **layer([200, 0, 100, 100])),
    "collapse": fields(2, **layer([1000, 1, 1, 1] * 2)),
    "imbalance": fields(9, **layer([450, *[100] * 7])),
    "router_saturated": fields(60, **layer([100] * 4, 0.0, 0.0)),  # a router of one's own, without scores
    "fallback_tokens": fields(60, **layer([110, 100, 100, 100])),
    "straggler": fields(60, slowest_rank_ratio=1.9),
}


@pytest.mark.parametrize(("kind", "made", "when", "words", "evidence"), CASES, ids=[f"{c[0]}-{c[3]}" for c in CASES])
def test_each_is_found_once_with_its_key(
    interval: Make, kind: str, made: Callable[[Make], list[TrainRecord]], when: range, words: str, evidence: str
) -> None:
    (found,) = [finding for finding in diagnosed(made(interval)) if finding.kind == kind]
    assert found.step in [1 + 10 * number for number in when]
    assert words in found.words
    assert found.severity in ("warning", "critical")
    assert not evidence or math.isfinite(found.evidence[evidence])
    assert not found.key or f"`{found.key}`" in config_reference()
    assert found.key in found.words or found.kind in ("skipped_steps", "straggler")
    if kind in ("dead_experts", "collapse", "imbalance", "router_saturated", "fallback_tokens"):
        assert found.layer == 7
    if kind == "straggler":
        assert found.rank == 2


@pytest.mark.parametrize("kind", NEARLY)
def test_what_is_nearly_so_is_not_found(interval: Make, kind: str) -> None:
    assert [str(finding) for finding in diagnosed(NEARLY[kind](interval)) if finding.kind == kind] == []


def test_a_straggler_is_compared_within_its_stage() -> None:
    """Seen to fail with the median of all ranks: half as long as the others."""
    phases = {"data": [0.0] * 4, "computing": [0.5, 0.25, 1.0, 1.0]}
    ranks = RanksRecord([0.5, 0.25, 1.0, 1.0], phases, [100, 200, 900, 900], [0] * 4, [0] * 4)
    found = straggler(0, ranks, 7, ["alpha"] * 4, [0, 0, 1, 1])
    assert found.words.startswith("rank 0 on alpha takes 2.0 times as long as the others, most of it computing (500 ms")
    assert found.evidence == {"own_seconds": 0.5, "others": 0.25, "lost_seconds": 0.25, "rows_ratio": 0.5}


def test_a_restart_repeats_nothing_of_the_model_and_forgets_the_machines(interval: Make) -> None:
    """Seen to fail with the number of skipped steps forgotten (told anew), and with the streak of waiting for data
    kept.
    """
    diagnosis, told = Diagnosis(), []
    diagnosis.resumed(start_of({"hosts": ["alpha"]}))
    for number in range(12):
        if number in (4, 8):
            diagnosis.resumed(start_of({"hosts": ["beta"]}))
        dead = layer([200, 0, 100, 100]) if number >= 6 else {}
        wait = 0.4 if number in (2, 3, 4, 5, 8, 9, 10) else 0.0
        changes = {"skipped_steps": 2 if number < 9 else 3, "data_wait_share": wait} | dead
        told += [(number, finding.kind) for finding in diagnosis.train(interval(number, **changes))]
    assert told == [(0, "skipped_steps"), (8, "dead_experts"), (10, "data_starved")]


def test_tokens_of_the_fallback_are_one_finding_until_they_stop(interval: Make) -> None:
    """Over after 10 intervals without one, and said again when they come back."""
    diagnosis, told = Diagnosis(), []
    for number in range(40):
        load = layer([110, 100, 100, 100], fallback=10 if number in (3, 5, 9, 30) else 0)
        told += [(number, str(one)) for one in diagnosis.train(interval(number, loss=6.0 - number / 10, **load))]
        assert bool(diagnosis.present) == (3 <= number < 19 or number >= 30), number
    assert [number for number, _ in told] == [3, 30]
    assert "step 31: 4.8 % of the tokens of layer 7 were routed by the fallback" in told[0][1]
    assert "lower optimizer.learning_rate" in told[0][1]


def test_every_kind_is_tried_and_documented() -> None:
    page = (Path(__file__).parents[3] / "docs/metrics.md").read_text()
    of_training = {case[0] for case in CASES}
    assert of_training == NEARLY.keys()
    more = {
        "uneven_load",
        "throughput_drop",
        "low_utilisation",
        "few_samples",
        "validation_diverging",
        "overfitting",
        "validation_rising",
        "slow_checkpoint",
        "checkpoint_failed",
    }
    for kind in of_training | more | {"restart", "run_failed", "action", "no_end", "stopped_itself", "nothing_learned"}:
        assert f"| `{kind}` |" in page, kind


def test_a_run_that_goes_on_near_its_end_is_not_flat(train_record: Make, interval: Make) -> None:
    run = [replace(interval(number, loss=2.0), step=5001 + 10 * number) for number in range(50)]
    assert diagnosed(run) == []
    assert "flat_loss" in {finding.kind for finding in diagnosed([replace(one, step=one.step - 5000) for one in run])}


def test_validation_that_rises(interval: Make) -> None:
    def found(training: Sequence[float], validation: Sequence[float]) -> list[Finding]:
        diagnosis, told = Diagnosis(), []
        for number, (loss, value) in enumerate(zip(training, validation, strict=True)):
            for inner in range(5):
                diagnosis.train(interval(5 * number + inner, loss=loss))
            told += diagnosis.evaluation(EvalRecord(50 * number, value, 1.0, 1, 1.0))
        return told

    (one,) = found([3.0, 2.5, 2.0, 1.5, 1.4], [3.1, 2.7, 2.8, 2.9, 3.0])
    assert (one.kind, one.step, one.key) == ("overfitting", 150, "train.early_stopping_patience")
    assert "rose from 2.7000 to 2.9000 while training loss fell from 2.5000 to 1.5000" in one.words
    (one,) = found([3.0, 2.5, 2.6, 2.7, 2.9], [3.1, 2.7, 2.8, 2.9, 3.0])
    assert one.kind == "validation_rising"
    assert found([3.0, 2.5, 2.0, 1.5, 1.4], [3.1, 2.7, 2.6, 2.65, 2.7]) == []


def test_checkpoints_that_hold_training_up() -> None:
    def found(blocked: float, between: float, ok: bool = True) -> list[str]:
        diagnosis = Diagnosis()
        return [
            finding.kind
            for number in range(5)
            for finding in diagnosis.checkpoint(
                CheckpointRecord(10 * number, blocked + 1, blocked, 1, "x", ok, "disk full"), 1000.0 + between * number
            )
        ]

    assert found(20.0, 100.0) == ["slow_checkpoint"]
    assert found(5.0, 100.0) == []
    assert found(20.0, 100.0, ok=False) == ["checkpoint_failed"] * 5


@pytest.fixture
def sick(tmp_path: Path, info: RunInfo, interval: Make, summary: RunSummary) -> Path:
    """A finished run with a dead expert and a slow rank; the loss is fine."""
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.open(replace(info, hosts=["alpha", "beta", "gamma", "delta"]))
    for number in range(10):
        sink.train(interval(number, loss=6.0 - number / 5, **layer([134, 0, 133, 133]), **slow_rank("data")))
    sink.summary(summary)
    sink.close()
    return tmp_path


def doctor(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", "doctor", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command(sick: Path, info: RunInfo, interval: Make, summary: RunSummary, tmp_path: Path) -> None:
    done = doctor(sick)
    assert (done.returncode, done.stderr) == (1, "")
    first, second = done.stdout.splitlines()
    assert first.startswith("warning: step 1: rank 2 on gamma takes 2.3 times as long")
    assert second.startswith("warning: step 21: layer 7: 1 of 4 experts get no tokens (1);")
    done = doctor(sick, "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert [(one["kind"], one["rank"], one["layer"], one["experts"]) for one in told] == [
        ("straggler", 2, None, []),
        ("dead_experts", None, 7, [1]),
    ]
    assert told[0]["key"] == "data.dataloader_num_workers"
    healthy = JsonlSink(tmp_path / "healthy" / "metrics.jsonl")
    healthy.open(info)
    for number in range(10):
        healthy.train(interval(number, loss=6.0 - number / 5))
    done = doctor(tmp_path / "healthy")  # it still runs
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].startswith("info: no end was logged: the run still runs")
    healthy.summary(summary)
    healthy.close()
    done = doctor(tmp_path / "healthy")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Nothing that needs attention.\n", "")
    assert json.loads(doctor(tmp_path / "healthy", "--json").stdout) == []
    done = doctor(tmp_path / "nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_the_command_is_quick_and_loads_no_torch(sick: Path) -> None:
    """Less than a second of work, and half of that is Python, the command line and the configuration."""
    code = (
        "import sys, time; from launcher.cli.commands import app\n"
        "for words in (['doctor', sys.argv[1]], ['doctor', sys.argv[1], '--json']):\n"
        "    app(words, standalone_mode=False)\n"
        "heavy = {'torch', 'plotly', 'tensorboard', 'transformers', 'datasets'} & set(sys.modules)\n"
        "print('heavy', *heavy, file=sys.stderr); print('cpu', time.process_time(), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(sick)], capture_output=True, text=True, timeout=60, check=True
    )
    heavy, cpu = done.stderr.splitlines()
    assert heavy == "heavy"
    assert float(cpu.split()[1]) < 1.0


def test_a_run_that_fell_silent_is_no_running_run(sick: Path) -> None:
    lines = (sick / "metrics.jsonl").read_text().splitlines()
    (sick / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    log = read_run(sick)
    (running,) = [finding for finding in findings(log) if finding.kind == "no_end"]
    assert running.severity == "info"
    (dead,) = [finding for finding in findings(log, now=time.time() + 3600) if finding.kind == "no_end"]
    assert dead.severity == "warning"
    assert "nothing written for 60 minutes" in dead.words


def test_the_report_shows_the_same(sick: Path) -> None:
    from moe_dist.monitor.report.page import write_report

    page = write_report([sick]).read_text()
    for finding in findings(read_run(sick)):
        assert str(finding) in page


def test_a_log_of_an_older_version_can_be_read(sick: Path) -> None:
    new = ("phase_seconds", "flops_per_second", "mfu", "stragglers", "ranks", "slowest_rank_ratio", "row_imbalance")
    rows = [json.loads(line) for line in (sick / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in (*new, "hosts"):
            row.pop(key, None)
        row["from_the_future"] = 1
    (sick / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [finding.kind for finding in findings(read_run(sick))] == ["dead_experts"]
