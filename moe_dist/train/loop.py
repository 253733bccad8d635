"""Steps until there is a reason to stop: the same code in one process, under torchrun, and for every layout."""

from __future__ import annotations

import signal
import time
from math import nan
from pathlib import Path

from moe_dist.config import Config
from moe_dist.data.loader import GlobalLoader
from moe_dist.data.streaming import StreamingPackedDataset
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.status import Status
from moe_dist.train.build import Datasets
from moe_dist.train.callbacks import Callbacks, Request, RunState
from moe_dist.train.checkpointing import Persistence
from moe_dist.train.counters import Counters
from moe_dist.train.evaluation import Evaluating
from moe_dist.train.rank_sync import StopRequests, agree
from moe_dist.train.reporting import Reporter
from moe_dist.train.result import TrainingResult
from moe_dist.train.run_setup import log_skipped_documents
from moe_dist.train.saving import Saving
from moe_dist.train.schedule import learning_rate
from moe_dist.train.step import StepResult, TrainStep
from moe_dist.train.stopping import Stopping


class TrainingLoop:
    """The middle and the end of a run, with parts that `MoETrainer` builds."""

    config: Config
    mesh: Mesh
    status: Status
    stop_requests: StopRequests
    output_dir: Path
    datasets: Datasets
    loader: GlobalLoader
    model: Transformer
    step: TrainStep
    counters: Counters
    stopping: Stopping
    reporter: Reporter
    evaluating: Evaluating
    persistence: Persistence
    saving: Saving
    callbacks: Callbacks
    started: float
    """When this start would have begun, had it done the whole run so far."""
    sample_before: str | None
    signal: int | None
    """By which the run was asked to stop."""
    losses: list[float]
    """Of every step of this start."""
    result: StepResult
    """Of the last step."""
    rate: float
    """Learning rate of the last step."""

    def state(self) -> RunState:
        """The run at this moment, as callbacks see it."""
        counters, result = self.counters, self.result
        return RunState(
            step=counters.step,
            max_steps=self.stopping.max_steps,
            epoch=self.loader.epoch,
            tokens=counters.tokens,
            elapsed=counters.elapsed,
            loss=result.loss if result.num_labels else nan,
            grad_norm=result.grad_norm,
            learning_rate=self.rate,
            num_tokens=result.num_tokens,
            num_labels=result.num_labels,
            skipped=result.skipped,
            skipped_steps=counters.skipped,
            stopping=self.stopping.reason,
            output_dir=self.output_dir,
            rank=self.mesh.rank,
            world_size=self.mesh.layout.world_size,
            model=self.model,
            rewards=result.rewards,
        )

    def _one_step(self) -> None:
        counters = self.counters
        self.status.at("waiting for data", step=counters.step + 1)
        position, end = self.stopping.position(counters.step, self.loader.samples_consumed)
        self.rate = learning_rate(self.config.optimizer, position, end, self.stopping.time_share(counters.elapsed))
        self.result = self.step(self.loader.next_step(), counters.step, self.rate)
        counters.add(self.result)
        self.losses.append(self.result.loss if self.result.num_labels else nan)
        self._agree()
        self.callbacks.emit("on_step_end")
        self._do(self.callbacks.requests())

    def _do(self, asked: Request) -> None:
        """What a person's callbacks have asked for."""
        if asked.evaluate:
            self.evaluating.evaluate(self.counters.step)
        if asked.save:
            self.saving.save()
        if asked.stop is not None:
            self.stopping.stop(asked.stop)

    def _agree(self) -> None:
        """Between two steps: time, signals and the save in flight, the same for every rank."""
        self.status.at("agreeing on the next step")
        elapsed = time.perf_counter() - self.started
        agreed = agree(self.mesh, elapsed, self.stop_requests.number, *self.persistence.checkpoints.status)
        self.counters.elapsed = agreed.elapsed
        if agreed.save_ended:
            self.saving.settle()
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

    def _finish(self) -> TrainingResult:
        self.status.at("ending")
        stopping = self.stopping
        if isinstance(self.datasets.train, StreamingPackedDataset):
            log_skipped_documents(self.datasets)  # not known before
        self.reporter.finish(self.state())
        if not stopping.failed and self.signal is None:
            self.evaluating.evaluate(self.counters.step)
        self.saving.finish(self.signal is not None)
        weights = self.saving.path
        if not stopping.failed and self.signal is None:
            weights = self._load_best() or weights
        sample = self.evaluating.sample() if self.signal is None else None
        samples = {"sample_before": self.sample_before, "sample_after": sample}
        self.reporter.summary(self.counters, stopping, self.evaluating.unigram, self.saving.path, **samples)
        result = self._result(self.saving.path, weights)
        self.callbacks.emit("on_run_end", result)
        return result

    def _finished_before(self) -> TrainingResult:
        """An earlier start has done all there is to do: nothing is done again, and nothing written."""
        self.reporter.sinks.message(
            f"finished at step {self.counters.step}: {self.stopping.reason}; nothing is left to do"
        )
        last = self.persistence.goes_on_from
        return self._result(last, self._load_best() or last)

    def _load_best(self) -> str | None:
        """Take the weights of the best checkpoint, if that is asked for; its path."""
        best = self.persistence.load_best() if self.config.checkpoint.load_best_model_at_end else None
        if best is None:
            return None
        self.reporter.sinks.message(f"the weights are those of {best}, the best one")
        return str(best)

    def _result(self, checkpoint: str | None, weights: str | None) -> TrainingResult:
        counters, stopping = self.counters, self.stopping
        return TrainingResult(
            initial_loss=nan if counters.initial_loss is None else counters.initial_loss,
            final_loss=nan if counters.final_loss is None else counters.final_loss,
            losses=self.losses,
            steps=counters.step,
            best_eval_loss=stopping.best_loss,
            unigram_loss=self.evaluating.unigram,
            reason=stopping.reason or "",
            failed=stopping.failed,
            output_dir=self.output_dir,
            signal=self.signal,
            checkpoint=checkpoint,
            weights=weights,
        )


def signal_name(number: int) -> str:
    """As people know it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
