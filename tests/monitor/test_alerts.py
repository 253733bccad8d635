"""Alert rules and the Grafana dashboard: real metric names, valid PromQL, and alerts that fire when they should."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from promql import ALERTS, METRIC, dashboard, faults, panel_queries, rules
from services import need

from moe_dist.monitor.expert_stats import layer_record
from moe_dist.monitor.health.rules import collapse_limit, imbalance_limit
from moe_dist.monitor.metric import metrics_of
from moe_dist.monitor.metrics import SINK_SERIES
from moe_dist.monitor.rank_facts import PHASE_KEYS
from moe_dist.monitor.records import CheckpointRecord, EvalRecord, LayerRecord, RanksRecord, RunInfo, TrainRecord
from moe_dist.monitor.sinks.prometheus_metrics import SnapshotSink

TESTS = Path(__file__).parent / "alerts_test.yml"


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [need("promtool"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_rules_are_valid() -> None:
    done = promtool("check", "rules", ALERTS)
    assert done.returncode == 0, done.stderr
    assert f"SUCCESS: {len(rules())} rules found" in done.stdout


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    done = promtool("test", "rules", TESTS)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = yaml.safe_load(TESTS.read_text())["tests"]
    fired = {check["alertname"] for test in tests for check in test["alert_rule_test"] if check.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in rules()}


PLANTS = """
moe_dist_train_loss != moe_dist_train_loss | moe_dist_train_loss == 77
abs(moe_dist_train_loss) == Inf | abs(moe_dist_train_loss) == 77
increase(moe_dist_skipped_steps_total[10m]) > 0 | increase(moe_dist_skipped_steps_total[10m]) > 5
> 300 + 3 | > 3000 + 3
> 300 + 3 | > 30 + 3
time() - moe_dist_run_start_timestamp_seconds > 1800 | time() - moe_dist_run_start_timestamp_seconds > 18000
up == 0 and on | up == 0 or on
last_over_time(moe_dist_run_start_timestamp_seconds[1d]) | moe_dist_run_start_timestamp_seconds
moe_dist_lasting_dead_experts > 0 | moe_dist_lasting_dead_experts > 2
increase(moe_dist_fallback_tokens_total[10m]) > 0 | increase(moe_dist_fallback_tokens_total[10m]) > 50
< moe_dist_used_experts_limit_ratio | < 0.2
> moe_dist_load_imbalance_limit_ratio | > 1
> moe_dist_load_imbalance_limit_ratio | > 5
> 600 + 2 | > 6000 + 2
or moe_dist_run_start_timestamp_seconds) |)
increase(moe_dist_checkpoint_failures_total[1h]) > 0 | increase(moe_dist_checkpoint_failures_total[1h]) > 5
moe_dist_data_wait_ratio > 0.2 | moe_dist_data_wait_ratio > 0.01
moe_dist_stragglers > 0 | moe_dist_stragglers > 1
moe_dist_stragglers > 0 | moe_dist_stragglers >= 0
) unless moe_dist_run_finished == 1 |)
for: 10m | for: 1m
for: 15m | for: 1m
"""


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS.strip().splitlines())
def test_the_unit_tests_of_the_alerts_can_fail(tmp_path: Path, plant: str) -> None:
    """A rule broken in a copy is seen."""
    right, _, wrong = plant.partition(" |")
    text = ALERTS.read_text()
    assert right in text
    (tmp_path / "moe_dist/monitor").mkdir(parents=True)
    (tmp_path / "tests/monitor").mkdir(parents=True)
    (tmp_path / "moe_dist/monitor/alerts.yml").write_text(text.replace(right, wrong.strip()))
    shutil.copy(TESTS, tmp_path / "tests/monitor")
    assert promtool("check", "rules", tmp_path / "moe_dist/monitor/alerts.yml").returncode == 0, "not a rule any more"
    assert promtool("test", "rules", tmp_path / "tests/monitor/alerts_test.yml").returncode != 0


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (128, 8)])
def test_the_limits_of_the_rules_are_those_of_the_doctor(
    train_record: Callable[..., TrainRecord], num_experts: int, top_k: int
) -> None:
    sink = SnapshotSink(logging_steps=10, per_expert="layer")
    layer = layer_record(5, [1000] * num_experts, 0, 1000 * num_experts // top_k, {}, top_k)
    sink.train(train_record(layers=[layer]))
    told = {sample.name: sample.value for family in sink.metrics.collect() for sample in family.samples}
    assert told["moe_dist_used_experts_limit_ratio"] == collapse_limit(layer) == math.sqrt(top_k / num_experts)
    assert told["moe_dist_load_imbalance_limit_ratio"] == imbalance_limit(layer)
    expressions = {rule["alert"]: rule["expr"] for rule in rules()}
    assert expressions["RouterCollapsed"] == "moe_dist_used_experts_ratio < moe_dist_used_experts_limit_ratio"
    assert expressions["LoadImbalanced"] == "moe_dist_load_imbalance_ratio > moe_dist_load_imbalance_limit_ratio"


def test_only_metrics_that_are_there(
    info: RunInfo, train_record: Callable[..., TrainRecord], eval_record: EvalRecord
) -> None:
    """Every metric in the dashboard and the rules is one a run exports; needs no Prometheus."""
    sink = SnapshotSink(logging_steps=10, per_expert="full")
    sink.open(RunInfo(**{**vars(info), "config_text": "checkpoint: {save_steps: 5}"}))
    rewards = dict.fromkeys(("rewards_chosen", "rewards_rejected", "reward_margin", "reward_accuracy"), 0.5)
    layers = [replace(layer, expert_ranks=[0] * len(layer.tokens_per_expert)) for layer in train_record().layers]
    sink.train(train_record(layers=layers, **rewards))
    sink.evaluation(replace(eval_record, tasks=dict.fromkeys(PHASE_KEYS, 0.5), **rewards))
    sink.checkpoint(CheckpointRecord(1, 1.0, 1.0, 1, "x"))
    exported = {sample.name for family in sink.metrics.collect() for sample in family.samples}
    records = (LayerRecord, RanksRecord, TrainRecord, EvalRecord, CheckpointRecord)
    series = [one for record in records for metric in metrics_of(record).values() for one in metric.series]
    table = {one.exported.format(phase) for one in (*SINK_SERIES.values(), *series) for phase in PHASE_KEYS}
    assert exported == table
    used = {name: METRIC.findall(query) for name, query in panel_queries().items()}
    used |= {rule["alert"]: METRIC.findall(rule["expr"]) for rule in rules()}
    assert all(used.values())
    assert {name: missing for name, found in used.items() if (missing := set(found) - exported)} == {}


def test_dashboard_shows_what_was_promised() -> None:
    board = dashboard()
    assert faults(board) == []
    titles = {panel["title"] for panel in board["panels"]}
    for words in (
        "Loss",
        "Validation loss",
        "Throughput",
        "Where the time goes",
        "Seconds per phase",
        "Imbalance tax and slow ranks",
        "Load of every expert, layer x expert",
        "Load imbalance",
        "Router entropy",
        "Dead experts",
        "Tokens routed by the fallback",
        "Checkpoint age",
        "Peak memory",
    ):
        assert words in titles
    assert {panel["type"] for panel in board["panels"]} == {"row", "stat", "timeseries", "table"}


FAULTS: list[tuple[Callable[[Any], object], str]] = [
    (lambda board: board.pop("title"), "dashboard: title"),
    (lambda board: board["panels"][1]["gridPos"].update(w=30), "Step: wider than the page"),
    (lambda board: board["panels"][2].update(id=board["panels"][1]["id"]), "Training loss: id 2 twice"),
    (lambda board: board["panels"][2]["gridPos"].update(x=0), "Training loss: over Step"),
    (lambda board: board["panels"][1].update(targets=[]), "Step: no query"),
    (lambda board: board["panels"][1]["targets"][0].update(expr="up"), "Step: not of the chosen run"),
    (lambda board: board["panels"][1]["targets"][0].pop("datasource"), "Step: not the chosen data source"),
    (lambda board: board["templating"]["list"].pop(), "variables {'datasource'}"),
]


@pytest.mark.parametrize(("plant", "said"), FAULTS, ids=[said for _, said in FAULTS])
def test_the_check_of_the_dashboard_can_fail(plant: Callable[[Any], object], said: str) -> None:
    board = copy.deepcopy(dashboard())
    plant(board)
    assert said in faults(board)


def test_every_query_of_the_dashboard_parses(tmp_path: Path) -> None:
    def check(queries: list[str]) -> subprocess.CompletedProcess[str]:
        made = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
        (tmp_path / "rules.json").write_text(json.dumps({"groups": [{"name": "panels", "rules": made}]}))
        return promtool("check", "rules", tmp_path / "rules.json")

    queries = list(panel_queries().values())
    done = check(queries)
    assert done.returncode == 0, done.stderr
    assert check([*queries, "sum(moe_dist_train_loss{)"]).returncode != 0
