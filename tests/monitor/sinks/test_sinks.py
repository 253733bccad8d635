"""Fan-out, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import gc
import io
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.config import MonitorConfig
from moe_dist.monitor.metric import metrics_of
from moe_dist.monitor.records import EvalRecord, LayerRecord, RunInfo, RunSummary, TrainRecord
from moe_dist.monitor.sinks import JsonlSink, Sink, Sinks, TensorBoardSink, build_sinks
from moe_dist.monitor.sinks.heatmap import COLD, FAIR, HOT, load_heatmap

Make = Callable[..., TrainRecord]


def rows(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class Recorder(Sink):
    name = "recorder"

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = 0

    def train(self, record: TrainRecord) -> None:
        self.steps.append(record.step)

    def close(self) -> None:
        self.closed += 1


class Broken(Recorder):
    name = "broken sink"

    def train(self, record: TrainRecord) -> None:
        super().train(record)
        raise OSError("disk full")


def test_a_failing_sink_is_named_once_and_dropped(train_record: Make, caplog: pytest.LogCaptureFixture) -> None:
    broken, good = Broken(), Recorder()
    sinks = Sinks([broken, good])
    with caplog.at_level(logging.WARNING, logger="moe_dist"):
        sinks.train(train_record(1))
        sinks.train(train_record(2))
    assert (broken.steps, broken.closed, good.steps) == ([1], 1, [1, 2])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "broken sink failed (OSError: disk full); training goes on without it"
    sinks.close()
    assert good.closed == 1


def test_an_interrupt_is_not_a_failing_sink(train_record: Make) -> None:
    class Interrupted(Sink):
        def train(self, record: TrainRecord) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks([Interrupted()]).train(train_record())


def test_unwritable_tensorboard_folder(
    tmp_path: Path, info: RunInfo, train_record: Make, caplog: pytest.LogCaptureFixture
) -> None:
    # A file where the folder should be: this fails for root too, whom permissions do not stop.
    (tmp_path / "tb").write_text("in the way")
    stream = io.StringIO()
    sinks = build_sinks(tmp_path, MonitorConfig(progress="plain"), stream=stream)
    with caplog.at_level(logging.WARNING, logger="moe_dist"):
        sinks.open(info)
        sinks.train(train_record(10))
        sinks.close()
    assert [row["kind"] for row in rows(tmp_path / "metrics.jsonl")] == ["run", "train"]
    assert "step: 10/5000" in stream.getvalue()
    assert len(caplog.records) == 1
    assert "TensorBoard failed" in caplog.text


def test_closed_pipe_ends_the_console_only(tmp_path: Path, train_record: Make) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    sinks = build_sinks(tmp_path, MonitorConfig(tensorboard=False), stream=Gone())
    sinks.train(train_record(1))
    sinks.train(train_record(2))
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_jsonl_rows_equal_the_records(
    tmp_path: Path, info: RunInfo, train_record: Make, eval_record: EvalRecord, summary: RunSummary
) -> None:
    sink, record = JsonlSink(tmp_path / "new" / "metrics.jsonl"), train_record()
    sink.open(info)
    sink.train(record)
    # Readable before the file is closed.
    assert len(rows(sink.path)) == 2
    sink.evaluation(eval_record)
    sink.summary(summary)
    sink.close()
    got = rows(sink.path)
    assert all(isinstance(row.pop("time"), float) for row in got)
    assert got == [item.to_json() for item in (info, record, eval_record, summary)]
    assert [row["kind"] for row in got] == ["run", "train", "eval", "summary"]
    assert got[1]["layers"][1]["tokens_per_expert"] == [20, 50, 20, 10]


def test_jsonl_non_finite_numbers(tmp_path: Path, train_record: Make) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.train(train_record(loss=math.nan, grad_norm=math.inf, learning_rate=-math.inf))
    (row,) = rows(sink.path)
    assert (row["loss"], row["grad_norm"], row["learning_rate"]) == ("NaN", "Infinity", "-Infinity")
    assert math.isnan(float(row["loss"]))
    assert float(row["grad_norm"]) == math.inf
    sink.close()


@pytest.mark.parametrize("torn", [b'{"kind": "tr', b"x" * 200_000])
def test_jsonl_appends_after_a_torn_line(tmp_path: Path, train_record: Make, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        sink = JsonlSink(path)
        sink.train(train_record(step))
        sink.close()
        with path.open("ab") as file:
            file.write(torn)
    sink = JsonlSink(path)
    sink.train(train_record(3))
    sink.close()
    assert [row["step"] for row in rows(path)] == [1, 2, 3]


def test_tensorboard_events_equal_the_records(
    tmp_path: Path, info: RunInfo, train_record: Make, eval_record: EvalRecord, summary: RunSummary
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink, record = TensorBoardSink(tmp_path / "tb"), train_record(500)
    eval_record = replace(eval_record, tasks={"a-b: acc": 0.5})
    sink.open(info)
    sink.train(record)
    sink.evaluation(eval_record)
    sink.summary(summary)
    sink.close()
    events = EventAccumulator(str(tmp_path / "tb/run-3f2a9c01"), size_guidance={"histograms": 0, "tensors": 0}).Reload()

    def scalar(tag: str) -> float:
        (event,) = events.Scalars(tag)
        assert event.step == 500
        return event.value

    expected = {
        "train/loss": record.loss,
        "train/learning_rate": record.learning_rate,
        "train/grad_norm": record.grad_norm,
        "train/epoch": record.epoch,
        "eval/loss": eval_record.loss,
        "eval/perplexity": eval_record.perplexity,
        "eval/unigram_loss": eval_record.unigram_loss,
        "eval/task_a_b_acc": 0.5,
        "perf/tokens_per_second": record.tokens_per_second,
        "perf/step_time_seconds": record.step_seconds,
        "perf/all_to_all_share": record.all_to_all_share,
        "perf/data_wait_fraction": record.data_wait_share,
        "perf/memory_peak_bytes": record.memory_bytes,
        "moe/load_balancing_loss": 1.05,
        "moe/dead_experts": 1,
        "moe/dropped_fraction": 0.01,
        "moe/layer_00/load_imbalance": 1.8,
        "moe/layer_03/z_loss": 3.0,
    }
    for layer in record.layers:
        for name, metric in metrics_of(LayerRecord).items():
            if metric.tag:
                expected[metric.tag.replace("moe/", f"moe/layer_{layer.layer:02d}/")] = getattr(layer, name)
    assert {tag: scalar(tag) for tag in expected} == pytest.approx(expected, rel=1e-6)

    (histogram,) = events.Histograms("moe/layer_03/tokens_per_expert")
    load = histogram.histogram_value
    assert list(load.bucket) == [20, 50, 20, 10]
    assert list(load.bucket_limit) == [0.5, 1.5, 2.5, 3.5]
    assert (load.num, load.sum) == (100, 120)

    (image,) = events.Images("moe/expert_load")
    assert (image.width, image.height) == (4 * 16, 2 * 16)
    texts = {
        tag: events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
        for tag in ("config", "run", "sample/before", "sample/after")
    }
    assert "hidden_size: 512" in texts["config"]
    # One image and one histogram per layer: no scalar per expert.
    assert (events.Tags()["images"], len(events.Tags()["histograms"])) == (["moe/expert_load"], len(record.layers))
    assert not [tag for tag in events.Tags()["scalars"] if "expert_0" in tag or "expert/" in tag]
    assert texts["sample/after"].startswith("    def parse(self, name):")


def test_tensorboard_has_each_step(tmp_path: Path, train_record: Make) -> None:
    """An interval of three steps is three points. Seen to fail with the last step alone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    names = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
    sink.train(train_record(12, steps={name: [3.0, 2.0, 1.0] for name in names}))
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag in ("train/loss", "train/learning_rate", "train/grad_norm", "perf/tokens_per_second"):
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [(10, 3.0), (11, 2.0), (12, 1.0)]
    assert [event.step for event in events.Scalars("train/epoch")] == [12]


def test_tensorboard_compares_runs_by_hyper_parameters(tmp_path: Path, info: RunInfo, train_record: Make) -> None:
    """Every key of the configuration with its value, in the run's own events; no second run is made."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    text = "model: {hidden_size: 512, attn_implementation: sdpa, sliding_window: null, mlp_only_layers: [1, 3]}\n"
    text += "optimizer: {learning_rate: 3.0e-4}\nbalance: {use_auxiliary_loss: true}\nmonitor: {logging_steps: 5}\n"
    sink = TensorBoardSink(tmp_path / "tb")
    sink.open(RunInfo(**{**vars(info), "config_text": text}))
    sink.train(train_record())
    sink.close()
    assert [path.is_file() for path in (tmp_path / "tb/run-3f2a9c01").iterdir()] == [True]
    events = EventAccumulator(str(tmp_path / "tb/run-3f2a9c01")).Reload()
    content = events.PluginTagToContent("hparams")
    started = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    found = {key: getattr(value, value.WhichOneof("kind")) for key, value in started.items()}
    assert found == {
        "world_size": 4,
        "model.hidden_size": 512,
        "model.attn_implementation": "sdpa",
        "model.mlp_only_layers": "[1, 3]",
        "optimizer.learning_rate": 3e-4,
        "balance.use_auxiliary_loss": True,
    }
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert metrics - {"eval/loss"} <= set(events.Tags()["scalars"])


def test_tensorboard_forgets_steps_that_a_resume_repeats(tmp_path: Path, train_record: Make) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, loss in ((10, 3.0), (20, 2.0)):
        sink = TensorBoardSink(tmp_path)
        for step in (start, start + 10):
            sink.train(train_record(step, loss=loss, layers=[]))
        sink.close()
        # Files are read in the order of their names, which hold seconds: too coarse for two runs in one test.
        (written,) = tmp_path.glob("events.out.tfevents.??????????.*")
        written.rename(tmp_path / f"events.out.tfevents.{start}")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (10, 3.0),
        (20, 2.0),
        (30, 2.0),
    ]


def test_heatmap_colours(train_record: Make) -> None:
    image = load_heatmap(train_record().layers)
    assert (image.shape, image.dtype) == ((32, 64, 3), np.uint8)
    assert tuple(image[0, 2 * 16]) == COLD
    assert tuple(image[16, 1 * 16]) == HOT
    assert tuple(image[0, 0]) == FAIR


def test_sinks_follow_the_configuration(tmp_path: Path) -> None:
    stream = io.StringIO()
    names = [sink.name for sink in build_sinks(tmp_path, MonitorConfig(), stream=stream).sinks]
    assert names == ["console", "metrics.jsonl", "TensorBoard"]
    names = [sink.name for sink in build_sinks(tmp_path, MonitorConfig(tensorboard=False)).sinks]
    assert names == ["console", "metrics.jsonl"]
    assert list(tmp_path.iterdir()) == []


def test_a_sink_on_a_full_disk_goes_on_when_there_is_room(
    small_disk: Path, train_record: Make, info: RunInfo, caplog: pytest.LogCaptureFixture
) -> None:
    """What it wrote before stays readable, also the line that only half fitted; the records missed are counted.

    Seen to fail with the sink dropped at the first error, and with the half line left in a buffer.
    """
    sinks = build_sinks(small_disk, MonitorConfig(progress="none", tensorboard=False))
    filling = small_disk / "filling"
    sinks.open(info)
    sinks.train(train_record(1))
    filling.write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
    with caplog.at_level(logging.WARNING, logger="moe_dist"):
        for step in range(2, 40):
            sinks.train(train_record(step))
        filling.unlink()
        sinks.train(train_record(40))
    found = rows(small_disk / "metrics.jsonl")
    steps = [row["step"] for row in found if row["kind"] == "train"]
    assert steps[0] == 1
    assert steps[-1] == 40
    full, again = [record.getMessage() for record in caplog.records]
    assert full == "metrics.jsonl: No space left on device; training goes on, and so does it when there is room"
    assert again == f"metrics.jsonl is written again; {40 - len(steps)} records are missing"
    assert 0 < 40 - len(steps) < 39
    sinks.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_sink_that_could_not_even_begin(
    small_disk: Path, train_record: Make, info: RunInfo, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorBoard too, whose own thread meets the full disk, and says so at the next record."""
    filling = small_disk / "filling"
    filling.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    sinks = build_sinks(small_disk, MonitorConfig(progress="none"))
    with caplog.at_level(logging.WARNING, logger="moe_dist"):
        sinks.open(info)
        for step in range(1, 500):
            sinks.train(train_record(step))
            if len(sinks._waiting) == 2:
                break
            time.sleep(0.01)
        gc.collect()
        filling.unlink()
        sinks.train(train_record(500))
        sinks.close()
    assert [row["kind"] for row in rows(small_disk / "metrics.jsonl")] == ["run", "train"]
    said = [record.getMessage() for record in caplog.records]
    assert sum("training goes on, and so does it when there is room" in text for text in said) == 2
    assert sum("is written again" in text for text in said) == 2
    assert any(path.stat().st_size > 1000 for path in (small_disk / "tb").rglob("events*"))
