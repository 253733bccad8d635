"""TensorBoard events. Tags are those of `monitor.metrics`: Hugging Face's Trainer's where it has one.

TensorBoard shows groups in the order of the alphabet: eval/ is the first of ours, and its first card the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from moe_dist.monitor.expert_stats import overall
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
from moe_dist.monitor.sinks.base import Sink
from moe_dist.monitor.sinks.detail import Detail
from moe_dist.monitor.sinks.heatmap import load_heatmap

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_SECONDS = 10

HPARAM_SECTIONS = ("model", "data", "parallel", "train", "optimizer", "balance")
HPARAM_METRICS = ("train/loss", "eval/loss", "perf/tokens_per_second", "moe/load_imbalance", "moe/dead_experts")
"""What the table of runs shows beside their hyper-parameters."""


class TensorBoardSink(Sink):
    """Scalars, a histogram per layer, a heatmap over all layers, hyper-parameters, configuration and samples."""

    name = "TensorBoard"

    def __init__(self, folder: Path | str, detail_steps: int | None = None) -> None:
        """`detail_steps`: steps between two records with layers and experts; default: see `Detail`."""
        self.folder = self._root = Path(folder)
        self._detail = Detail(detail_steps)
        self._open_writer: SummaryWriter | None = None
        self._started = False
        self._end: Any = None

    @property
    def _writer(self) -> SummaryWriter:
        if self._open_writer is None:
            # Imported here: it takes a second, and a run without TensorBoard should not wait for it.
            from torch.utils.tensorboard import SummaryWriter

            self._open_writer = SummaryWriter(str(self.folder), flush_secs=FLUSH_SECONDS)
        return self._open_writer

    def open(self, info: RunInfo) -> None:
        self.folder = self._root / info.label  # the name that TensorBoard shows
        self._writer.add_text("run", info.sentence)
        self._writer.add_text("config", f"```yaml\n{info.config_text.strip()}\n```")
        self._add_hparams(info)

    def train(self, record: TrainRecord) -> None:
        self._start_at(record.step - len(record.steps.get("loss", [0])) + 1)
        for name, tag, value in _scalars(record):
            # Of an interval some have a number for each step.
            values = record.steps.get(name, [value])
            for step, step_value in enumerate(values, record.step - len(values) + 1):
                self._writer.add_scalar(tag, step_value, step)
        totals = overall(record.layers)
        for metric in metrics_of(LayerRecord).values():
            if metric.tag and metric.name in totals:
                self._writer.add_scalar(metric.tag, totals[metric.name], record.step)
        detailed = record.layers if self._detail.is_due(record) else []
        for layer in detailed:
            folder = f"moe/layer_{layer.layer:02d}"
            for _, tag, value in _scalars(layer):
                self._writer.add_scalar(f"{folder}/{tag.removeprefix('moe/')}", value, record.step)
            self._add_load_histogram(f"{folder}/tokens_per_expert", layer, record.step)
        if detailed:
            self._writer.add_image("moe/expert_load", load_heatmap(detailed), record.step, dataformats="HWC")

    def evaluation(self, record: EvalRecord) -> None:
        self._start_at(record.step)
        for _, tag, value in _scalars(record):
            self._writer.add_scalar(tag, value, record.step)
        self._writer.flush()

    def checkpoint(self, record: CheckpointRecord) -> None:
        self._start_at(record.step)
        for _, tag, value in _scalars(record):
            self._writer.add_scalar(tag, value, record.step)

    def action(self, record: ActionRecord) -> None:
        if record.applied:
            key = record.key.removeprefix("balance.")
            self._writer.add_scalar(f"moe/layer_{record.layer:02d}/{key}", record.now, record.step)

    def summary(self, summary: RunSummary) -> None:
        for name, sample, step in (
            ("before", summary.sample_before, 0),
            ("after", summary.sample_after, summary.steps),
        ):
            if sample is not None:
                self._writer.add_text(f"sample/{name}", _as_code(sample), step)
        if self._end is not None:
            file_writer: Any = self._writer.file_writer
            file_writer.add_summary(self._end)
        self._writer.flush()

    def _add_hparams(self, info: RunInfo) -> None:
        """The configuration as hyper-parameters, so that runs can be compared by key in TensorBoard's HPARAMS tab.

        Into this run's own events: `SummaryWriter.add_hparams` would make a second run of it.
        """
        from torch.utils.tensorboard.summary import hparams

        experiment, start, self._end = hparams(hyper_parameters(info), dict.fromkeys(HPARAM_METRICS, 0.0))
        file_writer: Any = self._writer.file_writer
        file_writer.add_summary(experiment)
        file_writer.add_summary(start)

    def close(self) -> None:
        writer, self._open_writer = self._open_writer, None
        if writer is not None:
            writer.close()

    def _start_at(self, step: int) -> None:
        """Tell TensorBoard, once, that this start of the run begins here.

        What an earlier start wrote at this step or later, and undid by going back to a checkpoint, is left
        out of the curves. The step is known only now: `SummaryWriter(purge_step=...)` would be too early.
        """
        if self._started:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

        file_writer: Any = self._writer.file_writer
        file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        self._started = True

    def _add_load_histogram(self, tag: str, layer: LayerRecord, step: int) -> None:
        """Bucket e holds the pairs of expert e: counts are handed over as they are, nothing is binned."""
        load_E = np.asarray(layer.tokens_per_expert, dtype=np.float64)
        experts_E = np.arange(len(load_E))
        self._writer.add_histogram_raw(
            tag,
            min=-0.5,
            max=len(load_E) - 0.5,
            num=int(load_E.sum()),
            sum=float(load_E @ experts_E),
            sum_squares=float(load_E @ experts_E**2),
            bucket_limits=(experts_E + 0.5).tolist(),
            bucket_counts=load_E.tolist(),
            global_step=step,
        )


def _scalars(record: object) -> Iterator[tuple[str, str, float]]:
    """(name, tag, number) of all that a record has for TensorBoard."""
    for metric in metrics_of(type(record)).values():
        if metric.tag:
            yield from ((metric.name, metric.tag.format(key), float(value)) for key, value in metric.shown(record))


def hyper_parameters(info: RunInfo) -> dict[str, bool | int | float | str]:
    """Full key -> value, of all keys that say how the model learns; keys without a value are left out."""
    settings: Any = yaml.safe_load(info.config_text) or {}
    found: dict[str, bool | int | float | str] = {"world_size": info.world_size}
    for section in HPARAM_SECTIONS:
        for key, value in (settings.get(section) or {}).items():
            if value is not None:
                found[f"{section}.{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found


def _as_code(text: str) -> str:
    """Markdown that shows the text as it is: an indented block has no fence that the text could contain."""
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    "
