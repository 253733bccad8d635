"""Names that people and dashboards depend on: what the records of a run became when they were written down here.

`tests/fixtures/metrics` holds the lines of metrics.jsonl, the page of /metrics and the scalars of TensorBoard. More may
come; nothing there may go or change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from moe_dist.monitor.records import ActionRecord, CheckpointRecord, EvalRecord, RunInfo, RunSummary, TrainRecord
from moe_dist.monitor.sinks import JsonlSink, Sink, TensorBoardSink
from moe_dist.monitor.sinks.prometheus_metrics import SnapshotSink

GOLDEN = Path(__file__).parents[1] / "fixtures" / "metrics"
Make = Callable[..., TrainRecord]
RunOf = Callable[[Sink], None]


@pytest.fixture
def run(info: RunInfo, train_record: Make, eval_record: EvalRecord, summary: RunSummary) -> RunOf:
    """Tells a sink a short run in which everything has a value."""
    each = {"loss": [2.2, 2.1342], "learning_rate": [2.8e-4, 2.84e-4]}
    each |= {"grad_norm": [1.5, 0.9231], "tokens_per_second": [18_000.0, 18_469.0]}
    more: dict[str, Any] = {"tokens_per_second_per_device": 4558.625, "loss_std": 0.0329, "stragglers": [2]}
    more |= {"all_to_all_bytes_between_hosts": 1024, "dispatch_seconds": 0.06, "combine_seconds": 0.05, "steps": each}

    def tell(sink: Sink) -> None:
        sink.open(RunInfo(**{**vars(info), "config_text": "checkpoint: {save_steps: 50}", "start_tokens": 7}))
        sink.train(train_record(120, **more, skipped_steps=1))
        sink.evaluation(eval_record)
        sink.checkpoint(CheckpointRecord(120, 3.5, 0.5, 2_000_000, "run/checkpoint-120", reason="save_steps"))
        sink.checkpoint(CheckpointRecord(130, 1.0, 1.0, 0, "run/checkpoint-130", ok=False, reason="disk full"))
        sink.action(ActionRecord(120, 3, "balance.bias_update_rate", 1e-3, 2e-3, "why"))
        sink.summary(summary)
        sink.close()

    return tell


def jsonl(run: RunOf, folder: Path) -> list[dict[str, Any]]:
    """The rows, without the wall clock."""
    run(JsonlSink(folder / "metrics.jsonl"))
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in found]


def page(run: RunOf) -> dict[str, list[str]]:
    """The lines of every family, by name and in that order, without the wall clock and the version."""
    sink = SnapshotSink(logging_steps=10, per_expert="full")
    run(sink)
    text = re.sub(r'version="[^"]*"', 'version=""', generate_latest(sink.metrics).decode())  # type: ignore[arg-type]
    families = sorted(re.split(r"^(?=# HELP )", text, flags=re.MULTILINE)[1:])
    return {
        family.split()[2]: [re.sub(r"(_timestamp_seconds) .*", r"\1", line) for line in family.splitlines()]
        for family in families
    }


def tags(run: RunOf, folder: Path) -> dict[str, Any]:
    """Scalars by tag, and the tags of all else."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(TensorBoardSink(folder))
    (written,) = folder.iterdir()
    events = EventAccumulator(str(written)).Reload()
    found = events.Tags()
    scalars = {tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in sorted(found["scalars"])}
    return {"scalars": scalars} | {kind: sorted(found[kind]) for kind in ("histograms", "images", "tensors")}


def lost(golden: Any, now: Any, place: str = "") -> list[str]:
    """Places at which `now` does not have what `golden` has; it may have more keys."""
    if isinstance(golden, dict) and isinstance(now, dict):
        missing = [f"{place}/{key}" for key in golden if key not in now]
        kept = [key for key in golden if key in now]
        moved = [] if kept == [key for key in now if key in golden] else [f"{place}: another order"]
        return missing + moved + [one for key in kept for one in lost(golden[key], now[key], f"{place}/{key}")]
    if isinstance(golden, list) and isinstance(now, list) and len(golden) == len(now):
        pairs = enumerate(zip(golden, now, strict=True))
        return [one for index, (old, new) in pairs for one in lost(old, new, f"{place}/{index}")]
    return [] if golden == now else [f"{place}: {golden!r} is now {now!r}"]


def test_lines_of_the_log(run: RunOf, tmp_path: Path) -> None:
    """Seen to fail with a field of a layer renamed, and with two fields of a rank in another order."""
    assert lost([json.loads(line) for line in (GOLDEN / "metrics.jsonl").open()], jsonl(run, tmp_path)) == []


def test_page_of_metrics(run: RunOf) -> None:
    """Name, type, help and samples. Seen to fail with a gauge made a counter, and with one left out."""
    assert lost(json.loads((GOLDEN / "page.json").read_text()), page(run)) == []


def test_tags_of_tensorboard(run: RunOf, tmp_path: Path) -> None:
    """Seen to fail with a tag renamed."""
    golden = json.loads((GOLDEN / "tags.json").read_text())
    now = tags(run, tmp_path)
    now |= {kind: [tag for tag in now[kind] if tag in golden[kind]] for kind in ("histograms", "images", "tensors")}
    assert lost(golden, now) == []
