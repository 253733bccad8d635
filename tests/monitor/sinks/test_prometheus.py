"""The Prometheus sink over HTTP, and a real Pushgateway."""

from __future__ import annotations

import json
import logging
import math
import secrets
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from promql import evaluate, series
from ranks import free_port
from services import need, serving

from moe_dist.config import MonitorConfig, PrometheusConfig
from moe_dist.monitor.expert_stats import layer_record, load_ratios, used_share
from moe_dist.monitor.health.rules import collapse_limit, imbalance_limit
from moe_dist.monitor.metric import metrics_of
from moe_dist.monitor.records import (
    ActionRecord,
    CheckpointRecord,
    EvalRecord,
    LayerRecord,
    RunInfo,
    RunSummary,
    TrainRecord,
)
from moe_dist.monitor.sinks import JsonlSink, Sinks, build_sinks, prometheus
from moe_dist.monitor.sinks.prometheus import PrometheusSink, PushgatewaySink
from moe_dist.monitor.sinks.prometheus_metrics import SnapshotSink

Make = Callable[..., TrainRecord]
SAVED = CheckpointRecord(120, 3.5, 0.5, 2_000_000, "run/checkpoint-120", reason="save_steps")


def config(**changes: object) -> MonitorConfig:
    values: dict[str, object] = {"port": 0} | changes
    return MonitorConfig(progress="none", tensorboard=False, logging_steps=7, prometheus=PrometheusConfig(**values))  # type: ignore[arg-type]


@pytest.fixture
def sink(tmp_path: Path, info: RunInfo) -> Iterator[PrometheusSink]:
    made = PrometheusSink(tmp_path / "run", config())
    made.open(info)
    yield made
    made.close()


def scrape_text(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        return reply.read().decode()


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Every sample by name, then layer, then expert, then any other label."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            first = [labels.pop(name) for name in ("layer", "expert") if name in labels]
            key = (sample.name, *first, *labels.values())
            assert key not in found
            found[key] = sample.value
    return found


def scrape(sink: PrometheusSink) -> dict[tuple[str, ...], float]:
    return samples(scrape_text(sink.address))


def test_dead_for_long_is_not_absent_once(sink: PrometheusSink, train_record: Make) -> None:
    """Seen to fail with the experts of the last interval counted."""
    got = []
    for loads in ([0, 90, 90], [0, 90, 90], [0, 0, 90], [0, 90, 90], [90, 0, 90]):
        sink.train(train_record(layers=[layer_record(3, loads, 0, sum(loads) // 2, {}, 2)]))
        got.append(scrape(sink)["moe_dist_lasting_dead_experts", "3"])
    assert got == [0, 0, 1, 1, 0]


def test_a_scrape_equals_the_records(sink: PrometheusSink, train_record: Make, eval_record: EvalRecord) -> None:
    rewards = {"rewards_chosen": 0.5, "rewards_rejected": -0.25, "reward_margin": 0.75, "reward_accuracy": 0.625}
    record, before = train_record(**rewards), time.time()
    eval_record = replace(eval_record, **{name: value / 2 for name, value in rewards.items()})
    eval_record = replace(eval_record, tasks={"sentiment: f1": 0.61, "a-b: acc": 0.5})
    sink.train(record)
    sink.evaluation(eval_record)
    sink.checkpoint(SAVED)
    sink.action(ActionRecord(120, 3, "balance.bias_update_rate", 1e-3, 2e-3, "why"))
    sink.action(ActionRecord(120, 3, "balance.bias_update_rate", 1e-3, 2e-3, "why", applied=False))
    sink.checkpoint(CheckpointRecord(130, 1.0, 1.0, 0, "run/checkpoint-130", ok=False, reason="disk full"))
    got = scrape(sink)
    expected: dict[tuple[str, ...], float] = {}
    for source in (record, eval_record, SAVED):
        for field, metric in metrics_of(type(source)).items():
            if field not in ("phase_seconds", "stragglers", "tasks"):
                expected |= {(series.exported,): getattr(source, field) for series in metric.series}
    expected |= {(f"moe_dist_phase_{phase}_seconds",): seconds for phase, seconds in record.phase_seconds.items()}
    expected |= {("moe_dist_task_sentiment_f1",): 0.61, ("moe_dist_task_a_b_acc",): 0.5}
    expected["moe_dist_stragglers",] = 0
    assert record.ranks is not None
    for stage, ranks in (("0", (0, 1)), ("1", (2, 3))):
        own = sum(record.ranks.own_seconds[rank] for rank in ranks) / 2
        expected["moe_dist_stage_own_seconds", stage] = pytest.approx(own)
        expected["moe_dist_stage_memory_peak_bytes", stage] = 1_310_000_000
    expected |= {("moe_dist_layer_info", str(layer), str(layer // 2)): 1 for layer in range(4)}
    for layer in record.layers:
        number = str(layer.layer)
        gauges = {metric.gauge: field for field, metric in metrics_of(LayerRecord).items() if metric.gauge}
        expected |= {(f"moe_dist_{name}", number): getattr(layer, field) for name, field in gauges.items()}
        expected["moe_dist_used_experts_ratio", number] = used_share(layer)
        expected["moe_dist_used_experts_limit_ratio", number] = collapse_limit(layer)
        expected["moe_dist_load_imbalance_limit_ratio", number] = imbalance_limit(layer)
        expected["moe_dist_lasting_dead_experts", number] = 0
        expected["moe_dist_fallback_tokens_total", number] = layer.fallback_tokens
        for expert, (count, ratio) in enumerate(zip(layer.tokens_per_expert, load_ratios(layer), strict=True)):
            expected["moe_dist_expert_tokens_total", number, str(expert)] = count
            expected["moe_dist_expert_load_ratio", number, str(expert)] = ratio
    expected |= {
        ("moe_dist_checkpoints_total",): 1,
        ("moe_dist_checkpoint_failures_total",): 1,
        ("moe_dist_actions_total",): 1,
        ("moe_dist_run_finished",): 0,
        ("moe_dist_logging_interval_steps",): 7,
    }
    times = {key: value for key, value in got.items() if "timestamp" in key[0]}
    (infos,) = [key for key in got if key[0] == "moe_dist_run_info"]
    assert {"outputs/run", "cpu", "4", "50624512"} <= set(infos)
    assert {key: value for key, value in got.items() if key not in times and key != infos} == expected
    assert {name for (name,) in times} == {
        f"moe_dist_{name}_timestamp_seconds"
        for name in ("run_start", "last_step", "last_evaluation", "last_checkpoint")
    }
    assert all(before - 60 < value <= time.time() for value in times.values())
    assert got["moe_dist_load_balancing_loss", "0"] == pytest.approx(1.1)


def test_every_sample_says_its_run_when_asked(
    sink: PrometheusSink, train_record: Make, eval_record: EvalRecord
) -> None:
    """As the PodMonitor asks; the same as pushed metrics and targets.json say."""
    sink.train(train_record())
    sink.evaluation(eval_record)
    plain = scrape_text(sink.address)
    with urllib.request.urlopen(f"http://{sink.address}/metrics?label=run", timeout=10) as reply:
        labelled = list(text_string_to_metric_families(reply.read().decode()))
    (target,) = json.loads((sink.output_dir / "targets.json").read_text())
    assert {sample.labels["run"] for family in labelled for sample in family.samples} == {target["labels"]["run"]}
    without = [
        (sample.name, {name: value for name, value in sample.labels.items() if name != "run"}, sample.value)
        for family in labelled
        for sample in family.samples
    ]
    families = text_string_to_metric_families(plain)
    assert without == [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]
    assert scrape_text(sink.address) == plain


def test_names_and_labels_follow_the_rules(sink: PrometheusSink, train_record: Make, eval_record: EvalRecord) -> None:
    """`promtool check metrics` has no complaint; labels are layer, expert and stage; none in the global registry."""
    sink.train(train_record())
    sink.evaluation(eval_record)
    sink.checkpoint(SAVED)
    text = scrape_text(sink.address)
    labels = {
        label
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        for label in sample.labels
        if family.name != "moe_dist_run_info"
    }
    assert labels == {"layer", "expert", "stage"}
    assert "_created" not in text
    assert not [family.name for family in REGISTRY.collect() if "moe_dist" in family.name]
    done = subprocess.run(
        [need("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_expert_counters_grow_over_intervals(sink: PrometheusSink, train_record: Make) -> None:
    empty = [
        layer_record(0, [0] * 4, 0, 0, {}, 2),
        layer_record(3, [1, 2, 3, 4], 0, 5, {}, 2, fallback_tokens=3),
    ]
    for layers in (train_record().layers, train_record().layers, empty):
        sink.train(train_record(layers=layers))
    got = scrape(sink)
    assert [got["moe_dist_expert_tokens_total", "3", str(expert)] for expert in range(4)] == [41, 102, 43, 24]
    assert got["moe_dist_fallback_tokens_total", "3"] == 3
    # Nothing was routed through layer 0: its experts are not called dead.
    assert ("moe_dist_dead_experts", "0") not in got
    sink.train(train_record())
    assert scrape(sink)["moe_dist_expert_tokens_total", "0", "0"] == 75
    sink.train(train_record(layers=empty))
    assert scrape(sink)["moe_dist_fallback_tokens_total", "3"] == 6


def test_the_map_of_experts_is_shown_where_there_is_one(sink: PrometheusSink, train_record: Make) -> None:
    layers = [
        layer_record(0, [40, 30, 20, 10], 0, 50, {}, 2, ep_size=2, slots=[0, 3, 2, 1]),
        layer_record(3, [40, 30, 20, 10], 0, 50, {}, 2, ep_size=2),
    ]
    sink.train(train_record(layers=layers))
    got = scrape(sink)
    assert [got["moe_dist_expert_rank", "0", str(expert)] for expert in range(4)] == [0, 1, 1, 0]
    assert not any(key[:2] == ("moe_dist_expert_rank", "3") for key in got)
    assert (got["moe_dist_rank_imbalance_ratio", "0"], got["moe_dist_rank_imbalance_ratio", "3"]) == (1.0, 1.4)
    assert got["moe_dist_rank_imbalance_in_order_ratio", "0"] == 1.4


def test_counters_agree_over_a_restart(tmp_path: Path, info: RunInfo, train_record: Make) -> None:
    """Promtool's `increase()` over a start that goes on from a checkpoint: K pairs a layer for each token, and
    the steps done again count as work done. Seen to fail with `tokens_total` that went on from the checkpoint (1.25 K).
    """
    layer, scrapes = layer_record(0, [500, 500, 600, 400], 0, 1000, {}, 2), []
    for start, steps in ((0, (10, 20, 30)), (20, (30, 40, 50))):
        sink = SnapshotSink(logging_steps=10, per_expert="full")
        sink.open(replace(info, start_step=start, start_tokens=100 * start))
        for step in steps:
            sink.train(train_record(step, tokens=100 * step, layers=[layer]))
            scrapes.append(generate_latest(sink.metrics).decode())
    pairs = "sum(increase(moe_dist_expert_tokens_total[10m])) / sum(increase(moe_dist_tokens_total[10m]))"
    checks = [
        {"expr": pairs, "eval_time": "5m", "exp_samples": [{"labels": "{}", "value": 2}]},
        {
            "expr": "sum(resets(moe_dist_steps_total[10m]))",
            "eval_time": "5m",
            "exp_samples": [{"labels": "{}", "value": 1}],
        },
        {"expr": "sum(moe_dist_run_steps)", "eval_time": "5m", "exp_samples": [{"labels": "{}", "value": 50}]},
        {"expr": "sum(moe_dist_run_tokens)", "eval_time": "5m", "exp_samples": [{"labels": "{}", "value": 5000}]},
    ]
    assert evaluate(series(scrapes), checks, tmp_path) == ""


def test_two_runs_called_alike_have_two_names(info: RunInfo) -> None:
    one, other = (replace(info, output_dir="outputs/run", run_id=secrets.token_hex(8)) for _ in range(2))
    assert one.label.startswith("run-")
    assert one.label != other.label


def test_numbers_that_are_not_finite(sink: PrometheusSink, train_record: Make) -> None:
    sink.train(train_record(loss=math.nan, grad_norm=math.inf, max_steps=None, remaining_seconds=None))
    got = scrape(sink)
    assert math.isnan(got[("moe_dist_train_loss",)])
    assert got[("moe_dist_grad_norm",)] == math.inf
    assert ("moe_dist_max_steps",) not in got


@pytest.mark.parametrize(("per_expert", "experts"), [("full", 128), ("top", 8), ("layer", 0)])
def test_detail_per_expert(tmp_path: Path, info: RunInfo, train_record: Make, per_expert: str, experts: int) -> None:
    sink = PrometheusSink(tmp_path, config(per_expert=per_expert))
    sink.open(info)
    layers = [layer_record(n, [10 + e * (n + 1) for e in range(128)], 0, 9999, {}, 2) for n in range(3)]
    sink.train(train_record(layers=layers))
    got = scrape(sink)
    sink.close()
    shown = {key[1:]: value for key, value in got.items() if key[0] == "moe_dist_expert_load_ratio"}
    assert len(shown) == 3 * experts
    assert len([key for key in got if key[0] == "moe_dist_expert_tokens_total"]) == 3 * experts
    assert len([key for key in got if key[0] == "moe_dist_dead_experts"]) == 3
    if per_expert == "top":
        assert {int(expert) for layer, expert in shown if layer == "0"} == {0, 1, 2, 3, 124, 125, 126, 127}


def test_a_taken_port_is_said_and_the_next_one_used(
    tmp_path: Path, info: RunInfo, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen to fail with the loop over ports left out."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sink = PrometheusSink(tmp_path / "run", config(port=port))
        with caplog.at_level(logging.WARNING, logger="moe_dist"):
            sink.open(info)
        try:
            host, _, found = sink.address.rpartition(":")
            assert host == "127.0.0.1"
            assert port < int(found) < port + 100
            (message,) = [record.getMessage() for record in caplog.records]
            assert message == f"port {port} is taken; Prometheus metrics are at http://{sink.address}/metrics"
            assert "moe_dist_run_info" in scrape_text(sink.address)
            (target,) = json.loads((tmp_path / "run" / "targets.json").read_text())
            assert target == {"targets": [sink.address], "labels": {"run": "run-3f2a9c01"}}
        finally:
            sink.close()


def test_health_is_the_age_of_the_last_step(sink: PrometheusSink, train_record: Make) -> None:
    """Seen to fail with 200 whatever the age."""

    def health() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{sink.address}/healthz", timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    assert health() == (503, "no step was logged yet\n")
    sink.train(train_record())
    status, text = health()
    assert (status, text.rpartition(" logged ")[0]) == (200, f"step {train_record().step} was")
    sink.snapshot = replace(sink.snapshot, train_time=time.time() - 660)
    status, text = health()
    assert status == 503
    assert int(text.split()[-3]) >= 660
    assert "moe_dist_train_loss" in scrape_text(sink.address)


@pytest.mark.parametrize(("ending", "left"), [("planned", 0), ("failed", 1), ("exception", 1)])
def test_the_server_ends_with_the_run(
    tmp_path: Path, info: RunInfo, summary: RunSummary, ending: str, left: int
) -> None:
    """No thread and no port stays; only a run that ended as planned takes its target back."""
    threads = set(threading.enumerate())
    sink = PrometheusSink(tmp_path, config())
    sink.open(info)
    port = int(sink.address.rpartition(":")[2])
    scrape_text(sink.address)
    if ending != "exception":
        sink.summary(RunSummary(**{**vars(summary), "failed": ending == "failed"}))
        assert scrape(sink)[("moe_dist_run_finished",)] == (ending == "planned")
    sink.close()
    sink.close()
    # Those of requests end by themselves, a moment later.
    assert not [thread for thread in set(threading.enumerate()) - threads if thread.name == "metrics"]
    with socket.create_server(("127.0.0.1", port)):
        pass
    assert len(json.loads((tmp_path / "targets.json").read_text())) == left


def test_an_address_that_is_not_ours_is_one_warning(
    tmp_path: Path, info: RunInfo, train_record: Make, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = build_sinks(tmp_path, config(host="203.0.113.1"))
    with caplog.at_level(logging.WARNING, logger="moe_dist"):
        sinks.open(info)
        sinks.train(train_record(1))
        sinks.close()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("Prometheus failed (OSError")
    assert message.endswith("training goes on without it")
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [("127.0.0.1", 9400, "127.0.0.1:9400"), ("::1", 9400, "[::1]:9400"), ("0.0.0.0", 1, f"{socket.gethostname()}:1")],
)
def test_the_address_is_one_that_others_can_use(host: str, port: int, address: str) -> None:
    assert prometheus.address_of(host, port) == address


def test_off_unless_asked_for(tmp_path: Path) -> None:
    def names(**changes: object) -> list[str]:
        return [sink.name for sink in build_sinks(tmp_path, config(**changes)).sinks][2:]

    assert names(port=None) == []
    assert names(port=9400) == ["Prometheus"]
    assert names(port=None, pushgateway="http://127.0.0.1:9") == ["Pushgateway"]


def test_a_scrape_sees_one_moment(sink: PrometheusSink, train_record: Make) -> None:
    """A new record after every metric changes nothing. Seen to fail with the snapshot read once per metric."""
    sink.train(train_record(1, tokens=1000, loss=1.0))
    got = {}
    for later, family in enumerate(sink.metrics.collect(), start=2):
        got |= {sample.name: sample.value for sample in family.samples}
        sink.train(train_record(later, tokens=1000 * later, loss=float(later)))
    assert [got[f"moe_dist_{name}"] for name in ("steps_total", "tokens_total", "train_loss")] == [1, 1000, 1.0]
    assert scrape(sink)[("moe_dist_tokens_total",)] > 10_000


def test_checkpoints_reach_every_sink(tmp_path: Path, info: RunInfo, capsys: pytest.CaptureFixture[str]) -> None:
    settings = MonitorConfig(progress="plain", prometheus=PrometheusConfig(port=0))
    sinks = build_sinks(tmp_path, settings)
    sinks.open(info)
    capsys.readouterr()
    sinks.checkpoint(SAVED)
    sinks.checkpoint(CheckpointRecord(130, 1.0, 1.0, 0, "run/checkpoint-130", ok=False, reason="disk full"))
    sinks.close()
    assert capsys.readouterr().out.splitlines() == [
        "checkpoint step: 120  seconds: 3.5  blocked: 0.5  size: 2MiB  path: run/checkpoint-120",
        "checkpoint step: 130  seconds: 1.0  blocked: 1.0  failed: disk full",
    ]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"], row["ok"], row["reason"]) for row in rows[1:]] == [
        ("checkpoint", 120, True, "save_steps"),
        ("checkpoint", 130, False, "disk full"),
    ]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb" / "run-3f2a9c01")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("time/checkpoint_total_seconds")] == [
        (120, 3.5),
        (130, 1.0),
    ]
    assert [event.value for event in events.Scalars("perf/checkpoint_ok")] == [1, 0]


def test_a_real_pushgateway(
    tmp_path: Path, info: RunInfo, train_record: Make, summary: RunSummary, caplog: pytest.LogCaptureFixture
) -> None:
    """What is pushed is what the gateway shows, under the run's name; a gateway that dies is one warning."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    sink = PushgatewaySink(tmp_path / "my run", config(port=None, pushgateway=f"http://{address}"))
    sinks = Sinks([sink, JsonlSink(tmp_path / "metrics.jsonl")])
    with caplog.at_level(logging.WARNING, logger="moe_dist"):
        command = [need("prometheus-pushgateway"), f"--web.listen-address={address}"]
        with serving(command, f"http://{address}/-/ready", tmp_path / "gateway.log"):
            sinks.open(replace(info, output_dir=str(tmp_path / "my run")))
            sinks.train(train_record(10))
            sinks.train(train_record(20))
            text = scrape_text(address)
            assert 'moe_dist_steps_total{instance="' in text
            assert 'job="moe_dist",run="my run-3f2a9c01"} 20' in text
            assert caplog.records == []
        for step in (30, 40, 50):
            sinks.train(train_record(step))
        sinks.summary(summary)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"no push to the Pushgateway http://{address} (")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7


def test_a_gateway_that_never_answers_is_waited_for_once(
    tmp_path: Path, info: RunInfo, train_record: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail with the pause after a failed push left out: then every record waits."""
    monkeypatch.setattr(prometheus, "PUSH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections are taken by the kernel, and nobody reads
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        sink = PushgatewaySink(tmp_path, config(port=None, pushgateway=address))
        sink.open(info)
        with caplog.at_level(logging.WARNING, logger="moe_dist"):
            for step in range(1, 11):
                sink.train(train_record(step))
        silent.settimeout(0.5)
        calls = 0
        with suppress(TimeoutError):
            while True:
                silent.accept()[0].close()
                calls += 1
    assert (calls, len(caplog.records)) == (1, 1)
