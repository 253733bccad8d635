"""The table of metrics: whole, without contradictions, and enough to add a metric."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from moe_dist.models.auxiliary import ROUTER_SUMS
from moe_dist.monitor.metric import metrics_of
from moe_dist.monitor.metrics import SINK_SERIES
from moe_dist.monitor.records import (
    CheckpointRecord,
    EvalRecord,
    LayerRecord,
    RanksRecord,
    RunInfo,
    RunSummary,
    TrainRecord,
)
from moe_dist.monitor.sinks.tensorboard import HPARAM_METRICS

ROOT = Path(__file__).parents[2]
RECORDS = (LayerRecord, RanksRecord, TrainRecord, EvalRecord, CheckpointRecord, RunSummary)
METRICS = [metric for record in RECORDS for metric in metrics_of(record).values()]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_field_is_a_metric(record: type[Any]) -> None:
    """Seen to fail with a field without its annotation."""
    assert [*metrics_of(record)] == [field.name for field in fields(record)]
    assert all(metric.help.endswith(".") for metric in metrics_of(record).values())


def test_a_name_means_one_thing() -> None:
    """Seen to fail with the tag of `load_cv` given to `load_imbalance`."""
    series = [*SINK_SERIES.values(), *(one for metric in METRICS for one in metric.series)]
    names = [one.exported for one in series] + [metric.tag for metric in METRICS if metric.tag]
    assert [name for name, times in Counter(names).items() if times > 1] == []
    assert set(HPARAM_METRICS) <= set(names)
    # Counters of the run begin with what the checkpoint had, a sum of the router is a field or becomes one.
    of_the_run = [(metric.name, one) for metric in metrics_of(TrainRecord).values() for one in metric.series]
    starts = {f"start_{name}" for name, one in of_the_run if one.kind == "counter"}
    assert starts <= {field.name for field in fields(RunInfo)}
    assert set(ROUTER_SUMS) - {"router_logits_mean_square"} <= set(metrics_of(LayerRecord))


def test_numbers_of_the_router_may_be_missing() -> None:
    """A router without scores has none of them, an old log not all."""
    defaults = {field.name: field.default for field in fields(LayerRecord)}
    assert {name: defaults[name] for name in ROUTER_SUMS if defaults.get(name, 0.0) is MISSING} == {}


def applied(diff: str, root: Path) -> None:
    """Put the added lines of the diff behind the lines above them, which occur once."""
    for name, hunk in re.findall(r"^--- (\S+)\n((?:[ +].*\n)+)", diff, re.MULTILINE):
        above, added = re.fullmatch(r"((?: .*\n)+)((?:\+.*\n)+)", hunk).groups()  # type: ignore[union-attr]
        text = (root / name).read_text()
        above, added = (re.sub("^.", "", part, flags=re.MULTILINE) for part in (above, added))
        assert text.count(above) == 1, f"{name} has not once: {above}"
        (root / name).write_text(text.replace(above, above + added))


RUN = """
import json, pathlib, sys, torch
from prometheus_client import generate_latest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from moe_dist.config import BalanceConfig
from moe_dist.models.auxiliary import LoadBalance
from moe_dist.models.context import ALONE
from moe_dist.models.routing import Routing
from moe_dist.monitor.collector import Collector
from moe_dist.monitor.records import TrainRecord
from moe_dist.monitor.sinks import JsonlSink, TensorBoardSink
from moe_dist.monitor.sinks.prometheus_metrics import SnapshotSink
sys.path.insert(0, "tools")
import metrics_tables

collector = Collector([2], 4, 1, "cpu", lambda packed: 3 * packed)
scores_TE = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
balance = LoadBalance(BalanceConfig(), 4, 1)
balance.count_from_now_on(torch.device("cpu"))
routing = Routing(torch.ones(2, 1), torch.tensor([[0], [0]]), scores_TE, scores_TE.log().clamp(min=-9.0))
balance.losses(routing, 1, ALONE)
collector.add({2: balance.facts})
record = TrainRecord(1, 1, 0.0, 1.0, 1.0, 1.0, 2, 1.0, 1.0, 0.0, 0.0, 0, 1.0, 0.0, 1, layers=collector.take())
folder = pathlib.Path(sys.argv[1])
snapshot = SnapshotSink(1, "full")
for sink in (JsonlSink(folder / "metrics.jsonl"), TensorBoardSink(folder / "tb"), snapshot):
    sink.train(record)
    sink.close()
events = EventAccumulator(str(folder / "tb")).Reload()
print(json.dumps({
    "jsonl": json.loads((folder / "metrics.jsonl").read_text())["layers"][0],
    "tags": {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]},
    "page": generate_latest(snapshot.metrics).decode().splitlines(),
    "docs": metrics_tables.of_record("layers").splitlines(),
}))
"""


def test_a_metric_is_one_entry_and_one_line(tmp_path: Path) -> None:
    """The diff of CONTRIBUTING.md in a copy of the package: the number is in the log, in TensorBoard, on the page of
    Prometheus and in the table of the docs. Seen to fail with either half of the diff left out.
    """
    for name in ("moe_dist", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    applied((ROOT / "CONTRIBUTING.md").read_text(), tmp_path)
    command = [sys.executable, "-c", RUN, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    concentration = (0.5 + 1.0) / 2
    assert told["jsonl"]["router_concentration"] == concentration
    assert told["jsonl"]["router_confidence"] == (0.5 + 1.0) / 2  # the others are where they were
    assert told["jsonl"]["router_entropy"] == pytest.approx(0.3466, abs=1e-4)
    for tag in ("moe/router_concentration", "moe/layer_02/router_concentration"):
        assert told["tags"][tag] == concentration
    name = "moe_dist_router_concentration_ratio"
    assert f"# HELP {name} Mean of the sum of squares of a token's router scores." in told["page"]
    assert f'{name}{{layer="2"}} {concentration}' in told["page"]
    (row,) = [row for row in told["docs"] if "router_concentration" in row]
    assert f"| mean | `moe/router_concentration` | `{name}` by `layer` |" in row
