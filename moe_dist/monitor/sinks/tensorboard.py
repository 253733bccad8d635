"""TensorBoard events. Tags are Hugging Face's Trainer's where it has one; `docs/metrics.md` lists all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from moe_dist.monitor.expert_stats import RATIOS, overall
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

MOE_TAGS = {name: name for name in (*RATIOS, "dead_experts")} | {"aux_loss": "load_balancing_loss"}
"""Field of a LayerRecord -> last part of its tag."""


HPARAM_SECTIONS = ("model", "data", "parallel", "train", "optimizer", "balance")
HPARAM_METRICS = ("train/loss", "eval/loss", "perf/tokens_per_second", "moe/load_imbalance", "moe/dead_experts")
"""What the table of runs shows beside their hyper-parameters."""


# TensorBoard shows groups in the order of the alphabet: eval/ is the first of ours, and its first card the loss.
STEP_TAGS = {"train/loss", "train/learning_rate", "train/grad_norm", "perf/tokens_per_second"}
"""What is there for each step of an interval."""


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
        scalars = {
            "train/loss": record.loss,
            "train/loss_std": record.loss_std,
            "train/learning_rate": record.learning_rate,
            "train/grad_norm": record.grad_norm,
            "train/epoch": record.epoch,
            "train/tokens": record.tokens,
            "train/skipped_steps": record.skipped_steps,
            "perf/tokens_per_second": record.tokens_per_second,
            "perf/tokens_per_second_per_device": record.tokens_per_second_per_device,
            "perf/step_time_seconds": record.step_seconds,
            "perf/all_to_all_share": record.all_to_all_share,
            "perf/data_wait_fraction": record.data_wait_share,
            "perf/model_flops_per_second": record.flops_per_second,
            "perf/all_to_all_bytes": record.all_to_all_bytes,
            "perf/all_to_all_bytes_between_hosts": record.all_to_all_bytes_between_hosts,
            "perf/dispatch_seconds": record.dispatch_seconds,
            "perf/combine_seconds": record.combine_seconds,
            "perf/row_imbalance": record.row_imbalance,
            "perf/imbalance_tax_seconds": record.imbalance_seconds,
            "perf/slowest_rank_ratio": record.slowest_rank_ratio,
            "perf/stragglers": len(record.stragglers),
            "perf/memory_peak_bytes": record.memory_bytes,
        }
        scalars |= {f"time/{phase}_seconds": seconds for phase, seconds in record.phase_seconds.items()}
        for name in ("mfu", "device_utilisation", "samples_per_second"):
            if (value := getattr(record, name)) is not None:
                scalars[f"perf/{name}"] = value
        totals = overall(record.layers)
        scalars |= {f"moe/{tag}": totals[name] for name, tag in MOE_TAGS.items() if name in totals}
        detailed = record.layers if self._detail.is_due(record) else []
        for layer in detailed:
            folder = f"moe/layer_{layer.layer:02d}"
            scalars |= {f"{folder}/{tag}": getattr(layer, name) for name, tag in MOE_TAGS.items()}
            self._add_load_histogram(f"{folder}/tokens_per_expert", layer, record.step)
        for tag, value in scalars.items():
            values = record.steps.get(tag.partition("/")[2], [value]) if tag in STEP_TAGS else [value]
            for step, step_value in enumerate(values, record.step - len(values) + 1):
                self._writer.add_scalar(tag, step_value, step)
        if detailed:
            self._writer.add_image("moe/expert_load", load_heatmap(detailed), record.step, dataformats="HWC")

    def evaluation(self, record: EvalRecord) -> None:
        self._start_at(record.step)
        self._writer.add_scalar("eval/loss", record.loss, record.step)
        self._writer.add_scalar("eval/perplexity", record.perplexity, record.step)
        if record.unigram_loss is not None:
            self._writer.add_scalar("eval/unigram_loss", record.unigram_loss, record.step)
        self._writer.flush()

    def checkpoint(self, record: CheckpointRecord) -> None:
        self._start_at(record.step)
        for tag, value in (
            ("time/checkpoint_total_seconds", record.seconds),
            ("time/checkpoint_blocked_seconds", record.blocked_seconds),
            ("perf/checkpoint_bytes", record.bytes),
            ("perf/checkpoint_ok", float(record.ok)),
        ):
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
