"""Build the parts, then loop: the same code in one process, under torchrun, and for every layout."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint.plain import LogicalState, PlainCheckpoints, list_checkpoints
from moe_dist.config import Config
from moe_dist.data.baseline import unigram_loss
from moe_dist.data.loader import eval_batches
from moe_dist.data.packing import PackedDataset
from moe_dist.monitor.collector import Collector
from moe_dist.monitor.health import Health
from moe_dist.monitor.records import CheckpointRecord, EvalRecord, LayerRecord, RunSummary, TrainRecord
from moe_dist.monitor.sinks import Sinks, build_sinks
from moe_dist.parallel.clock import Clock
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.balance import Balancer
from moe_dist.train.build import build_datasets, build_gradients, build_loader, build_model, build_optimizer
from moe_dist.train.evaluation import evaluate, sample_text
from moe_dist.train.opening import merge_config, prepare_run_folder, run_info
from moe_dist.train.schedule import learning_rate
from moe_dist.train.step import StepResult, TrainStep
from moe_dist.train.stopping import Stopping

logger = logging.getLogger("moe_dist")


@dataclass(frozen=True)
class TrainingResult:
    """How a run went. Losses are nats per token; `failed`: it stopped for a reason a person must look at."""

    initial_loss: float
    final_loss: float
    losses: list[float]
    steps: int
    best_eval_loss: float | None
    unigram_loss: float | None
    reason: str
    failed: bool
    output_dir: Path


class MoETrainer:
    """Trains what a configuration describes.

        MoETrainer("configs/demo.yaml", output_dir="outputs/try").train()

    `config`: a `Config`, a path to a YAML file, or a mapping of sections; or give `model_config` and
    `training_config` (a mapping with keys of any section, or a `transformers.TrainingArguments`, of which whatever
    differs from its defaults is taken). `mesh`: this rank's place; by default one process.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | Path | None = None,
        *,
        model_config: Mapping[str, Any] | None = None,
        training_config: Any = None,
        output_dir: str | Path | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.config = merge_config(config, model_config, training_config, output_dir)
        self.mesh = mesh or Mesh.single()
        self.output_dir = self.config.train.output_dir

    def train(self, dataset: Any = None) -> TrainingResult:
        """Run to the end. `dataset`: texts, token lists or a `datasets` dataset instead of the configured source.

        Raises ValueError for what only the data or a checkpoint can show to be wrong.
        """
        self._build(dataset)
        try:
            self._resume()
            self._open()
            while self.stopping.reason is None:
                self._one_step()
            return self._finish()
        finally:
            self.loader.close()
            self.sinks.close()

    def _build(self, dataset: Any) -> None:
        config, mesh = self.config, self.mesh
        prepare_run_folder(config, mesh)
        torch.use_deterministic_algorithms(config.train.deterministic)
        self.sinks = build_sinks(self.output_dir, config.monitor) if mesh.rank == 0 else Sinks([])
        self.clock = Clock(mesh.device)
        self.datasets = build_datasets(config, dataset)
        self.loader = build_loader(config, self.datasets.train, mesh)
        self.model = build_model(config, mesh, self.clock)
        self.gradients = build_gradients(self.model, config, mesh)
        self.optimizer = build_optimizer(self.model, self.gradients, config)
        self.balancer = Balancer(self.model, mesh, config.balance.bias_update_rate)
        self.step = TrainStep(self.model, mesh, self.gradients, self.optimizer, self.balancer, config)
        self.collector = Collector(
            config.model.moe_layers,
            config.model.num_experts,
            config.model.num_experts_per_tok,
            mesh.device,
            partial(mesh.sum_over, "world"),
        )
        self.checkpoints = PlainCheckpoints(self.output_dir, mesh, config.checkpoint.save_total_limit)
        self.stopping = Stopping(config.train, self.loader.steps_per_epoch)
        self.steps_done, self.tokens, self.skipped = 0, 0, 0
        self.evaluated_at = self.saved_at = -1
        self.losses: list[float] = []
        self.unigram: float | None = None
        self.layers: list[LayerRecord] = []
        self.health, self.interval = Health(), Interval()

    def _open(self) -> None:
        config = self.config
        skipped = self.datasets.skipped
        for document in skipped:
            logger.info("left out: %s at %s: %s", document.id, document.offset, document.reason)
        if skipped:
            logger.warning(
                "%d documents could not be read and are left out, the first: %s at %s: %s; train.log names all",
                *(len(skipped), skipped[0].id, skipped[0].offset, skipped[0].reason),
            )
        self.sinks.open(run_info(config, self.mesh, self.datasets))
        if self.datasets.validation is not None and isinstance(self.datasets.train, PackedDataset):
            self.unigram = unigram_loss(self.datasets.train, self.datasets.validation, config.model.vocab_size)
        self.sample_before = self._sample()
        self.started = time.perf_counter()
        self.interval = Interval()
        if self.stopping.max_steps is not None and self.steps_done >= self.stopping.max_steps:
            self.stopping.after_step(self.steps_done, 0.0, 0.0, False, 0.0)

    def _one_step(self) -> None:
        config, waiting = self.config, time.perf_counter()
        batches = self.loader.next_step()
        self.interval.data_wait += time.perf_counter() - waiting
        share = self._time_share()
        rate = learning_rate(config.optimizer, self.steps_done, self.stopping.max_steps, share)
        result = self.step(batches, self.steps_done, rate)
        self.collector.add(self.balancer.facts)
        self.balancer.clear()
        self.steps_done += 1
        self.tokens += result.num_tokens
        self.skipped += result.skipped
        if result.skipped:
            logger.warning(
                "step %d: loss %s, gradient norm %s; nothing updated", self.steps_done, result.loss, result.grad_norm
            )
        self.losses.append(result.loss)
        self.interval.add(result)
        self.stopping.after_step(self.steps_done, result.loss, self.loader.epoch, result.skipped, share)
        if self.steps_done % config.monitor.logging_steps == 0 or self.steps_done == 1 or self.stopping.reason:
            self._log(result, rate)
        if config.train.eval_steps and self.steps_done % config.train.eval_steps == 0:
            self._evaluate()
        if config.checkpoint.save_steps and self.steps_done % config.checkpoint.save_steps == 0:
            self._save()

    def _time_share(self) -> float:
        """Part of the time budget that has passed, by rank 0's clock: all ranks must stop at the same step."""
        budget = self.config.train.max_time
        if budget is None:
            return 0.0
        elapsed = torch.tensor([time.perf_counter() - self.started], dtype=torch.float64, device=self.mesh.device)
        return min(1.0, float(self.mesh.from_rank_zero(elapsed)) / budget)

    def _log(self, result: StepResult, rate: float) -> None:
        self.layers = self.collector.take()
        for sentence in self.health.observe(self.layers) if self.mesh.rank == 0 else ():
            logger.warning("%s", sentence)
        interval, self.interval = self.interval, Interval()
        seconds = max(1e-9, time.perf_counter() - interval.started)
        elapsed = time.perf_counter() - self.started
        self.sinks.train(
            TrainRecord(
                step=self.steps_done,
                max_steps=self.stopping.max_steps,
                epoch=self.loader.epoch,
                loss=result.loss,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                tokens=self.tokens,
                tokens_per_second=interval.tokens / seconds,
                step_seconds=seconds / max(1, interval.steps),
                all_to_all_share=min(1.0, self.clock.take() / seconds),
                data_wait_share=min(1.0, interval.data_wait / seconds),
                skipped_steps=self.skipped,
                elapsed_seconds=elapsed,
                remaining_seconds=self._remaining(elapsed, seconds / max(1, interval.steps)),
                memory_bytes=peak_memory(self.mesh.device),
                layers=self.layers,
            )
        )

    def _remaining(self, elapsed: float, step_seconds: float) -> float | None:
        ends = []
        if self.stopping.max_steps is not None:
            ends.append((self.stopping.max_steps - self.steps_done) * step_seconds)
        if self.config.train.max_time is not None:
            ends.append(max(0.0, self.config.train.max_time - elapsed))
        return min(ends) if ends else None

    def _evaluate(self) -> None:
        validation = self.datasets.validation
        if validation is None or self.evaluated_at == self.steps_done:
            return
        self.evaluated_at = self.steps_done
        train = self.config.train
        before = time.perf_counter()
        batches = eval_batches(
            validation,
            train.per_device_eval_batch_size or train.per_device_train_batch_size,
            self.mesh.layout.dp_size,
            self.mesh.dp_rank,
            train.eval_batches,
        )
        found = evaluate(self.model, batches, self.mesh, bf16=train.bf16, document_mask=self.config.data.document_mask)
        is_best = self.stopping.after_evaluation(found.loss)
        self.sinks.evaluation(
            EvalRecord(
                self.steps_done, found.loss, found.perplexity, found.num_tokens, found.seconds, self.unigram, is_best
            )
        )
        self.clock.take()
        self.interval.started += time.perf_counter() - before

    def _sample(self) -> str | None:
        train = self.config.train
        if not train.sample_tokens:
            return None
        text = sample_text(
            self.model,
            self.datasets.tokenizer,
            train.sample_prompt,
            train.sample_tokens,
            context=self.config.data.max_seq_length,
            mesh=self.mesh,
            seed=train.seed,
        )
        self.clock.take()
        return text

    def _state(self) -> LogicalState:
        return LogicalState(self.model, self.optimizer.named_state(), self.mesh)

    def _save(self) -> Path:
        folder = self.output_dir / f"checkpoint-{self.steps_done}"
        if self.saved_at == self.steps_done:
            return folder
        self.saved_at = self.steps_done
        before = time.perf_counter()
        counters = {
            "tokens": self.tokens,
            "skipped": self.skipped,
            "initial_loss": self.losses[0] if self.losses else None,
            "stopping": self.stopping.state_dict(),
            "data": self.loader.state_dict(),
            "model": self.config.model.model_dump(mode="json"),
        }
        self.checkpoints.save(self.steps_done, self._state(), counters)
        seconds = time.perf_counter() - before
        self.interval.started += seconds
        size = sum(file.stat().st_size for file in folder.iterdir()) if self.mesh.rank == 0 else 0
        self.sinks.checkpoint(CheckpointRecord(self.steps_done, seconds, seconds, size, str(folder)))
        return folder

    def _resume(self) -> None:
        wanted = self.config.checkpoint.resume
        found = list_checkpoints(self.output_dir)
        if wanted == "never" or (wanted == "auto" and not found):
            return
        folder = found[-1] if wanted == "auto" else Path(wanted)
        self.optimizer.create_state()
        counters = self.checkpoints.load(folder, self._state(), self.config.model.model_dump(mode="json"))
        self.optimizer.follow_masters()
        self.steps_done, self.tokens, self.skipped = counters["step"], counters["tokens"], counters["skipped"]
        self.saved_at = self.steps_done
        self.stopping.load_state_dict(counters["stopping"])
        self.loader.load_state_dict(counters["data"])
        self.sinks.message(f"resumed from {folder} at step {self.steps_done}")

    def _finish(self) -> TrainingResult:
        if not self.stopping.failed:
            self._evaluate()
        seconds = time.perf_counter() - self.started
        paths = {"run folder": str(self.output_dir), "metrics": str(self.output_dir / "metrics.jsonl")}
        if self.config.monitor.tensorboard:
            paths["TensorBoard"] = str(self.output_dir / "tb")
        if self.config.checkpoint.save_at_end and not self.stopping.failed:
            paths["checkpoint"] = str(self._save())
        losses = [loss for loss in self.losses if loss == loss] or [float("nan")]
        reason = self.stopping.reason or ""
        self.sinks.summary(
            RunSummary(
                steps=self.steps_done,
                seconds=seconds,
                initial_loss=losses[0],
                final_loss=losses[-1],
                best_eval_loss=self.stopping.best_loss,
                unigram_loss=self.unigram,
                tokens=self.tokens,
                tokens_per_second=self.tokens / max(1e-9, seconds),
                skipped_steps=self.skipped,
                reason=reason,
                failed=self.stopping.failed,
                paths=paths,
                sample_before=self.sample_before,
                sample_after=self._sample(),
                layers=self.layers,
            )
        )
        return TrainingResult(
            losses[0],
            losses[-1],
            self.losses,
            self.steps_done,
            self.stopping.best_loss,
            self.unigram,
            reason,
            self.stopping.failed,
            self.output_dir,
        )


class Interval:
    """What happened since the last logged line."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.steps, self.tokens, self.data_wait = 0, 0, 0.0

    def add(self, result: StepResult) -> None:
        self.steps += 1
        self.tokens += result.num_tokens


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on CUDA, resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
