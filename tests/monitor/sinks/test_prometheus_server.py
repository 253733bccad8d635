"""A real Prometheus server beside a real training run: found by targets.json, and every query has an answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from promql import ALERTS, METRIC, panel_queries, rules
from ranks import free_port
from services import need, serving

pytestmark = [pytest.mark.dist, pytest.mark.slow]

T = TypeVar("T")

CONFIG = """\
model:
  vocab_size: 272
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  moe_intermediate_size: 32
  num_experts: 4
  max_position_embeddings: 64
data:
  source: text
  path: {folder}/text/*.txt
  max_seq_length: 64
  validation_split: 0.2
parallel:
  ep_size: 2
train:
  output_dir: {folder}/my run
  max_steps: 100000
  per_device_train_batch_size: 2
  eval_steps: 20
  eval_batches: 1
checkpoint:
  save_steps: 25
  save_total_limit: 1
monitor:
  logging_steps: 5
  progress: plain
  tensorboard: false
  prometheus: {{port: 0}}
launch:
  nproc_per_node: 2
  device: cpu
"""


@contextmanager
def training(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`moe-dist train` on two ranks, until the block ends."""
    (folder / "text").mkdir()
    for number in range(12):
        words = " ".join(f"word{(number + 1) * place % 97}" for place in range(200))
        (folder / "text" / f"{number}.txt").write_text(words)
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    command = [sys.executable, "-m", "moe_dist", "train", str(folder / "run.yaml")]
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def server(folder: Path, address: str) -> list[str]:
    """The command of a Prometheus that reads the run's targets.json and the alert rules."""
    settings: dict[str, Any] = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [
            {
                "job_name": "training",
                "file_sd_configs": [{"files": [str(folder / "my run" / "targets.json")], "refresh_interval": "1s"}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    storage = f"--storage.tsdb.path={folder / 'data'}"
    return [
        need("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        storage,
        f"--web.listen-address={address}",
    ]


def ask(address: str, path: str, **query: str) -> Any:
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=10) as reply:
        answer = json.load(reply)
    assert answer["status"] == "success"
    return answer["data"]


def until(found: Callable[[], T], what: str, within: float = 200.0) -> T:
    deadline = time.monotonic() + within
    while not (answer := found()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.3)
    return answer


def test_every_query_has_an_answer_and_a_killed_run_is_noticed(tmp_path: Path) -> None:
    """Seen to fail with a metric renamed in the sink, with one renamed in a panel, and with targets.json left out."""
    address = f"127.0.0.1:{free_port()}"
    command = server(tmp_path, address)

    def values(query: str) -> list[dict[str, Any]]:
        return ask(address, "query", query=query)["result"]

    with serving(command, f"http://{address}/-/ready", tmp_path / "prometheus.log"), training(tmp_path) as run:

        def alive() -> bool:
            assert run.poll() is None, (tmp_path / "out").read_text()
            return True

        # Prometheus may ask before the run has answered everything once.
        until(lambda: alive() and values("moe_dist_validation_loss and moe_dist_checkpoint_seconds"), "first records")
        missing = until(
            lambda: alive() and [[n for n, query in panel_queries("my run-.*").items() if not values(query)]], "panels"
        )[0]
        if missing:  # rates need a second scrape
            time.sleep(3)
            missing = [name for name, query in panel_queries("my run-.*").items() if not values(query)]
        assert missing == []
        assert values('moe_dist_train_loss{run="another"}') == []
        assert len(values('moe_dist_expert_load_ratio{run=~"my run-[0-9a-f]{8}"}')) == 2 * 4

        loaded = {rule["name"]: rule for group in ask(address, "rules")["groups"] for rule in group["rules"]}
        assert set(loaded) == {rule["alert"] for rule in rules()}
        assert {rule["health"] for rule in loaded.values()} <= {"ok", "unknown"}
        for rule in rules():
            for metric in METRIC.findall(rule["expr"]):
                assert values(metric), f"{rule['alert']}: no {metric}"

        def alerts() -> list[dict[str, str]]:
            found = [alert["labels"] for alert in ask(address, "alerts")["alerts"]]
            return [labels for labels in found if labels["alertname"] != "Straggler"]  # a busy machine may have them

        assert alerts() == []

        # What Prometheus has is what the run has logged.
        rows = [json.loads(line) for line in (tmp_path / "my run" / "metrics.jsonl").read_text().splitlines()]
        logged = {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
        history = {
            name: dict(values(f"{name}[1m]")[0]["values"]) for name in ("moe_dist_steps_total", "moe_dist_train_loss")
        }
        both = [
            (int(step), float(history["moe_dist_train_loss"][when]))
            for when, step in history["moe_dist_steps_total"].items()
            if when in history["moe_dist_train_loss"]
        ]
        assert both
        assert [(step, logged[step]) for step, _ in both if step in logged] == [b for b in both if b[0] in logged]

        os.killpg(run.pid, 9)
        run.wait(10)
        firing = until(alerts, "an alert")
        assert {labels["alertname"] for labels in firing} == {"TrainingUnreachable"}
        assert {labels["run"][:-8] for labels in firing} == {"my run-"}


def test_a_planned_end_takes_its_target_back(tmp_path: Path) -> None:
    """The server ends with the run, at once, and Prometheus has nothing to complain about."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "1.txt").write_text("word " * 2000)
    (tmp_path / "text" / "2.txt").write_text("other " * 2000)
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    command = [sys.executable, "-m", "moe_dist", "train", str(tmp_path / "run.yaml"), "train.max_steps=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checkpoint step: 4" in done.stdout
    assert "Prometheus metrics are at http://127.0.0.1:" in (tmp_path / "my run" / "train.log").read_text()
    assert json.loads((tmp_path / "my run" / "targets.json").read_text()) == []
