"""Build the parts, then loop: the same code in one process, under torchrun, and for every layout."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.lock import Job
from moe_dist.checkpoint.manager import Outcome
from moe_dist.config import Config, ModelConfig
from moe_dist.data.baseline import unigram_loss
from moe_dist.data.loader import eval_batches
from moe_dist.data.losses import losses
from moe_dist.data.packing import PackedDataset
from moe_dist.data.streaming import StreamingPackedDataset
from moe_dist.models.transformer import Transformer
from moe_dist.monitor.sinks import ConsoleSink
from moe_dist.monitor.train_log import log_path
from moe_dist.parallel import proven
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.device import set_deterministic
from moe_dist.parallel.engines.registry import build_engine
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.status import Status
from moe_dist.train.auto_balance import AutoBalance
from moe_dist.train.balance import Balancer
from moe_dist.train.build import build_datasets, build_loader, build_model, given
from moe_dist.train.checkpointing import Counters, Persistence
from moe_dist.train.evaluation import evaluate, sample_text
from moe_dist.train.first_step import FirstStep
from moe_dist.train.init_distributed import own_place
from moe_dist.train.rank_sync import StopRequests, agree
from moe_dist.train.reporting import Reporter, sinks_of
from moe_dist.train.result import TrainingResult
from moe_dist.train.run_setup import architecture_of, merge_config, one_of, run_info, take_run_folder
from moe_dist.train.run_summary import causality_warning
from moe_dist.train.schedule import learning_rate
from moe_dist.train.step import TrainStep
from moe_dist.train.stopping import Pace, Stopping

logger = logging.getLogger("moe_dist")


class MoETrainer:
    """Trains what a configuration describes.

        MoETrainer("configs/demo.yaml", output_dir="outputs/try").train()

    `config`: a `Config`, a path to a YAML file, or a mapping of sections; over it `model_config` and
    `training_config` (a mapping with keys of any section, or a `transformers.TrainingArguments`, whose values are taken
    as they are). `model` and `args` are these two under Hugging Face's names; `model` may also be a `Transformer`,
    whose weights are then trained where they are, in one process. `mesh`: this rank's place; by default the process it
    is called in, on `launch.device`, or all ranks of a program that torchrun has started. `launch.nproc_per_node` is
    for `moe-dist train`: from Python nothing is started. `job`: which starts belong together; by default this one
    stands alone. `opened` is told this rank's log file once there is one.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        model_config: Mapping[str, Any] | None = None,
        training_config: Any = None,
        output_dir: str | os.PathLike[str] | None = None,
        model: Transformer | ModelConfig | Mapping[str, Any] | None = None,
        args: Any = None,
        mesh: Mesh | None = None,
        stop_requests: StopRequests | None = None,
        status: Status | None = None,
        job: Job | None = None,
        opened: Callable[[Path], object] = lambda path: None,
    ) -> None:
        model_config = one_of("model", architecture_of(model), "model_config", model_config)
        training_config = one_of("args", args, "training_config", training_config)
        self.config = merge_config(config, model_config, training_config, output_dir)
        self._given = model if isinstance(model, Transformer) else None
        if mesh is not None:
            self.mesh = mesh
        self.stop_requests = stop_requests or StopRequests()
        self.status = status or Status()
        self.job = job or Job()
        self._opened = opened
        self.output_dir = self.config.train.output_dir

    def train(self, dataset: Any = None) -> TrainingResult:
        """Run to the end. `dataset`: texts, token lists or a `datasets` dataset instead of the configured source.

        Raises ValueError for a layout that these ranks cannot have, and for what only the data or a checkpoint can
        show to be wrong.
        """
        if not hasattr(self, "mesh"):
            self.mesh = own_place(self.config)
        if dataset is not None:
            self.config.data = given(self.config.data)
        self.place = take_run_folder(self.config, self.mesh, self.job)
        self.first_step = FirstStep(ConsoleSink(self.config.monitor.progress).message)
        try:
            if self.mesh.rank == 0:
                self.first_step.begin()
            self._build(dataset)
            try:
                self.persistence.restore(self.counters, self.reporter.sinks.message)
                self.step.set_temperature(self.counters.step)
                self.stopping.before_start(self.counters.step, self.loader.epoch, self._time_share())
                self._measure_before()
                if self.counters.step and self.stopping.reason:
                    return self._finished_before()
                self._begin()
                with self.stop_requests:
                    while self.stopping.reason is None:
                        self._one_step()
                    return self._finish()
            finally:
                self.loader.close()
                self.reporter.sinks.close()
        finally:
            self.first_step.done()
            if self.place.lock is not None:
                self.place.lock.leave()

    def _build(self, dataset: Any) -> None:
        config, mesh = self.config, self.mesh
        set_deterministic(config.train.deterministic, config.train.torch_compile)
        sinks = sinks_of(config, mesh)
        self.first_step.at("reading the data")
        self.clock = Clock(mesh.device, self.status)
        self.datasets = build_datasets(config, dataset)
        num_domains = len(self.datasets.domains)
        self.reporter = Reporter(config, mesh, self.clock, sinks, num_domains)
        self.first_step.say = self.reporter.sinks.message
        self.first_step.at("building the model")
        self.loader = build_loader(config, self.datasets.train, mesh)
        self.model = build_model(config, mesh, self.clock, self._given)
        self.engine = build_engine(self.model, config, mesh)
        self.balancer = Balancer(self.model, mesh, config.balance.bias_update_rate, num_domains)
        self.step = TrainStep(self.model, mesh, self.engine, self.balancer, config, self.status)
        self.stopping = Stopping(config.train, Pace(self.loader.global_batch_size, self.loader.samples_per_epoch))
        self.acting = AutoBalance(config, mesh, self.balancer, self.reporter.collector.pending)
        self.counters = Counters()
        parts = (self.model, self.engine, self.loader, self.stopping, self.acting)
        self.persistence = Persistence(config, mesh, *parts, self.place, self.datasets, self.status.alive)
        self.persistence.check_room()
        self.evaluated_at, self.eval_loss = -1, float("nan")
        self.signal: int | None = None
        self.last_saved: str | None = None
        self.losses: list[float] = []

    def _measure_before(self) -> None:
        """What training is held against. The last that can be wrong with model or data."""
        if self.datasets.validation is not None and isinstance(self.datasets.train, PackedDataset):
            vocabulary = self.config.model.vocab_size
            self.reporter.unigram = unigram_loss(self.datasets.train, self.datasets.validation, vocabulary)
        self.sample_before = None if self.stopping.reason else self._sample()

    def _begin(self) -> None:
        """All that can be checked is right: the first change in the run folder."""
        config = self.config
        self.persistence.begin(self.reporter.sinks.message)
        self._opened(log_path(self.output_dir, self.mesh.rank))
        self._tell_skipped()
        info = replace(
            run_info(config, self.mesh, self.datasets, self.place.run),
            start_step=self.counters.step,
            start_tokens=self.counters.tokens,
            start_skipped_steps=self.counters.skipped,
        )
        self.reporter.sinks.open(info)
        if info.world_size > 1 and self.mesh.rank == 0:  # one process is what others are held against
            self.reporter.sinks.message(proven.line_for(config, info.device, info.world_size))
        if (warning := causality_warning(config)) is not None and self.mesh.rank == 0:
            logger.warning(warning)
        self.reporter.diagnosis.resumed(info)
        self.started = time.perf_counter() - self.counters.elapsed
        self.reporter.begin()
        self.first_step.place = self.step.where

    def _tell_skipped(self) -> None:
        skipped = self.datasets.skipped
        for document in skipped:
            logger.info("left out: %s at %s: %s", document.id, document.offset, document.reason)
        if skipped:
            logger.warning("%s; train.log names all", losses(skipped, self.datasets.num_documents))

    def _one_step(self) -> None:
        config, counters = self.config, self.counters
        self.status.at("waiting for data", step=counters.step + 1)
        position, end = self.stopping.position(counters.step, self.loader.samples_consumed)
        rate = learning_rate(config.optimizer, position, end, self._time_share())
        batches = self.loader.next_step()
        result = self.step(batches, counters.step, rate)
        self.reporter.add(result, self.balancer.facts, rate)
        self.balancer.clear()
        counters.add(result)
        self.step.set_temperature(counters.step)
        if result.skipped:
            logger.warning(
                "step %d: loss %s, gradient norm %s; nothing updated", counters.step, result.loss, result.grad_norm
            )
        if not result.num_labels:
            logger.warning("step %d: no token of the whole batch has a label; there is no loss", counters.step)
        self.losses.append(result.loss if result.num_labels else float("nan"))
        self._agree()
        self.stopping.after_step(counters.step, result.loss, self.loader.epoch, result.skipped, self._time_share())
        self.stopping.count_labels(result.num_labels)
        if counters.step % config.monitor.logging_steps == 0 or counters.step == 1 or self.stopping.reason:
            self.reporter.log(counters, self.stopping, result, rate, self.loader.epoch)
            self.status.at("agreeing on the next step")  # with rank 0, which has written its line first
            self.reporter.actions(self.acting.observe(counters.step, self.reporter.layers))
        self.first_step.done()
        if config.train.eval_steps and counters.step % config.train.eval_steps == 0:
            self._evaluate()
        if self.persistence.is_due(counters.step):
            self._save()

    def _agree(self) -> None:
        """Between two steps: time, signals and the save in flight, the same for every rank."""
        self.status.at("agreeing on the next step")
        elapsed = time.perf_counter() - self.started
        agreed = agree(self.mesh, elapsed, self.stop_requests.number, *self.persistence.checkpoints.status)
        self.counters.elapsed = agreed.elapsed
        if agreed.save_ended:
            self._saved(self.persistence.settle())
        if agreed.signal is not None and self.signal is None:
            self.signal = agreed.signal
            # A launcher that has heard Ctrl-C sends SIGTERM; SIGINT, which it blocks in its ranks, then waits here.
            by_hand = agreed.signal == signal.SIGTERM and signal.SIGINT in signal.sigpending()
            self.stopping.stop(f"stopped by {signal_name(signal.SIGINT if by_hand else agreed.signal)}")

    def _asked_to_stop(self) -> bool:
        """Whether any rank has been asked to stop, for use within an evaluation."""
        if self.signal is None:
            before = self.status.inside("agreeing on the next step", None)
            self._agree()
            self.status.back(before)
        return self.signal is not None

    def _time_share(self) -> float:
        """Part of the time budget that has passed, by rank 0's clock: all ranks must stop at the same step."""
        budget = self.config.train.max_time
        return 0.0 if budget is None else min(1.0, self.counters.elapsed / budget)

    def _evaluate(self) -> None:
        validation = self.datasets.validation
        if validation is None or self.evaluated_at == self.counters.step:
            return
        train = self.config.train
        self.status.at("evaluating")
        before = time.perf_counter()
        batches = eval_batches(
            validation,
            train.per_device_eval_batch_size or train.per_device_train_batch_size,
            self.mesh.layout.dp_size,
            self.mesh.dp_rank,
            train.eval_batches,
        )
        with self.clock.stopped():
            found = evaluate(
                self.model,
                batches,
                self.mesh,
                bf16=train.bf16,
                document_mask=self.config.data.document_mask,
                stop=self._asked_to_stop,
            )
        if found is None:  # asked to stop: an unfinished evaluation says nothing
            return
        self.evaluated_at, self.eval_loss = self.counters.step, found.loss
        self.reporter.evaluation(self.counters.step, found, self.stopping.after_evaluation(found.loss))
        self.reporter.leave_out(time.perf_counter() - before)

    def _sample(self) -> str | None:
        train = self.config.train
        if not train.sample_tokens or self.signal is not None:
            return None
        with self.clock.stopped():
            return sample_text(
                self.model,
                self.datasets.tokenizer,
                train.sample_prompt,
                train.sample_tokens,
                context=self.config.data.max_seq_length,
                mesh=self.mesh,
                seed=train.seed,
            )

    def _save(self) -> None:
        self.status.at("saving")
        before = time.perf_counter()
        metrics = {"eval_loss": self.eval_loss} if self.evaluated_at == self.counters.step else {}
        ended = self.persistence.save(self.counters, metrics)
        if ended is not None:
            self._saved(ended)
        if not self.config.checkpoint.background and self.persistence.checkpoints.in_flight:
            self._saved(self.persistence.settle())
        self.reporter.leave_out(time.perf_counter() - before)

    def _saved(self, outcome: Outcome) -> None:
        """A save has ended, well or not."""
        self.reporter.checkpoint(outcome)
        if outcome.error is None:
            self.last_saved = outcome.path
            return
        self.counters.saves_failed += 1
        self._stop_when_lost()
        if self.config.checkpoint.on_failure == "stop":
            self.stopping.stop(f"checkpoint of step {outcome.step} failed: {outcome.error}", failed=True)

    def _stop_when_lost(self) -> None:
        """Without its run folder, or with another run in it, a run trains for nothing."""
        reason = self.persistence.lost()
        if reason is not None:
            self.stopping.fail(reason)

    def _save_the_last_step(self) -> None:
        """The end of a run that saves: what is in flight, and this step. Both must succeed."""
        persistence = self.persistence
        if persistence.checkpoints.in_flight:
            self._saved(persistence.settle())
        at_end = self.config.checkpoint.save_at_end or (self.signal is not None and persistence.is_on)
        if at_end and not self.stopping.failed and persistence.saved_step != self.counters.step:
            self._save()
        if persistence.checkpoints.in_flight:
            outcome = persistence.settle()
            self._saved(outcome)
            if outcome.error is not None:
                self.stopping.fail(f"the last checkpoint could not be written: {outcome.error}")

    def _finish(self) -> TrainingResult:
        self.status.at("ending")
        stopping = self.stopping
        if isinstance(self.datasets.train, StreamingPackedDataset):
            self._tell_skipped()  # not known before
        if not stopping.failed and self.signal is None:
            self._evaluate()
        self._save_the_last_step()
        self._stop_when_lost()
        if not stopping.failed and self.signal is None:
            self._load_best()
        paths = {"run folder": str(self.output_dir), "metrics": str(self.output_dir / "metrics.jsonl")}
        if self.config.monitor.tensorboard:
            paths["TensorBoard"] = str(self.output_dir / "tb")
        if self.last_saved is not None:
            paths["checkpoint"] = self.last_saved
        samples = {"sample_before": self.sample_before, "sample_after": self._sample()}
        self.reporter.summary(self.counters, stopping, paths=paths, **samples)
        return self._result()

    def _finished_before(self) -> TrainingResult:
        """An earlier start has done all there is to do: nothing is done again, and nothing written."""
        self.reporter.sinks.message(
            f"finished at step {self.counters.step}: {self.stopping.reason}; nothing is left to do"
        )
        self._load_best()
        self.last_saved = self.persistence.goes_on_from
        return self._result()

    def _load_best(self) -> None:
        best = self.persistence.load_best() if self.config.checkpoint.load_best_model_at_end else None
        if best is not None:
            self.reporter.sinks.message(f"the weights are those of {best}, the best one")

    def _result(self) -> TrainingResult:
        counters, stopping = self.counters, self.stopping
        nan = float("nan")
        return TrainingResult(
            initial_loss=nan if counters.initial_loss is None else counters.initial_loss,
            final_loss=nan if counters.final_loss is None else counters.final_loss,
            losses=self.losses,
            steps=counters.step,
            best_eval_loss=stopping.best_loss,
            unigram_loss=self.reporter.unigram,
            reason=stopping.reason or "",
            failed=stopping.failed,
            output_dir=self.output_dir,
            signal=self.signal,
            checkpoint=self.last_saved,
        )


def signal_name(number: int) -> str:
    """As people know it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
