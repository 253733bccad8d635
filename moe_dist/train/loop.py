"""Steps until there is a reason to stop: the same code in one process, under torchrun, and for every layout."""

from __future__ import annotations

import signal
import time
from math import nan
from pathlib import Path

from moe_dist.config import Config
from moe_dist.data.streaming import StreamingPackedDataset
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.status import Status
from moe_dist.train.callbacks import Callbacks, Request, RunState
from moe_dist.train.parts import Parts
from moe_dist.train.rank_sync import StopRequests, agree
from moe_dist.train.result import TrainingResult
from moe_dist.train.run_setup import log_skipped_documents
from moe_dist.train.schedule import learning_rate
from moe_dist.train.step import StepResult


class TrainingLoop:
    """The middle and the end of a run, with the parts that `MoETrainer` has built."""

    config: Config
    mesh: Mesh
    status: Status
    stop_requests: StopRequests
    output_dir: Path
    parts: Parts
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
        parts, counters, result = self.parts, self.parts.counters, self.result
        return RunState(
            step=counters.step,
            max_steps=parts.stopping.max_steps,
            epoch=parts.loader.epoch,
            tokens=counters.tokens,
            elapsed=counters.elapsed,
            loss=result.loss if result.num_labels else nan,
            grad_norm=result.grad_norm,
            learning_rate=self.rate,
            num_tokens=result.num_tokens,
            num_labels=result.num_labels,
            skipped=result.skipped,
            skipped_steps=counters.skipped,
            stopping=parts.stopping.reason,
            output_dir=self.output_dir,
            rank=self.mesh.rank,
            world_size=self.mesh.layout.world_size,
            model=parts.model,
            rewards=result.rewards,
        )

    def _one_step(self) -> None:
        parts, counters = self.parts, self.parts.counters
        self.status.at("waiting for data", step=counters.step + 1)
        position, end = parts.stopping.position(counters.step, parts.loader.samples_consumed)
        self.rate = learning_rate(self.config.optimizer, position, end, parts.stopping.time_share(counters.elapsed))
        self.result = parts.step(parts.loader.next_step(), counters.step, self.rate)
        counters.add(self.result)
        self.losses.append(self.result.loss if self.result.num_labels else nan)
        self._agree()
        self.callbacks.emit("on_step_end")
        self._do(self.callbacks.requests())

    def _do(self, asked: Request) -> None:
        """What a person's callbacks have asked for."""
        parts = self.parts
        if asked.evaluate:
            parts.evaluating.evaluate(parts.counters.step)
        if asked.save:
            parts.saving.save()
        if asked.stop is not None:
            parts.stopping.stop(asked.stop)

    def _agree(self) -> None:
        """Between two steps: time, signals and the save in flight, the same for every rank."""
        parts = self.parts
        self.status.at("agreeing on the next step")
        elapsed = time.perf_counter() - self.started
        agreed = agree(self.mesh, elapsed, self.stop_requests.number, *parts.persistence.checkpoints.status)
        parts.counters.elapsed = agreed.elapsed
        if agreed.save_ended:
            parts.saving.settle()
        if agreed.signal is not None and self.signal is None:
            self.signal = agreed.signal
            # A launcher that has heard Ctrl-C sends SIGTERM; SIGINT, which it blocks in its ranks, then waits here.
            by_hand = agreed.signal == signal.SIGTERM and signal.SIGINT in signal.sigpending()
            parts.stopping.stop(f"stopped by {signal_name(signal.SIGINT if by_hand else agreed.signal)}")

    def _asked_to_stop(self) -> bool:
        """Whether any rank has been asked to stop, for use within an evaluation."""
        if self.signal is None:
            before = self.status.inside("agreeing on the next step", None)
            self._agree()
            self.status.back(before)
        return self.signal is not None

    def _finish(self) -> TrainingResult:
        self.status.at("ending")
        parts, stopping = self.parts, self.parts.stopping
        if isinstance(parts.datasets.train, StreamingPackedDataset):
            log_skipped_documents(parts.datasets)  # not known before
        parts.reporter.finish(self.state())
        if not stopping.failed and self.signal is None:
            parts.evaluating.evaluate(parts.counters.step)
        parts.saving.finish(self.signal is not None)
        weights = parts.saving.path
        if not stopping.failed and self.signal is None:
            weights = self._load_best() or weights
        sample = parts.evaluating.sample() if self.signal is None else None
        samples = {"sample_before": self.sample_before, "sample_after": sample}
        unigram, path = parts.evaluating.unigram, parts.saving.path
        parts.reporter.summary(parts.counters, stopping, unigram, path, **samples)
        result = self._result(path, weights)
        self.callbacks.emit("on_run_end", result)
        return result

    def _finished_before(self) -> TrainingResult:
        """An earlier start has done all there is to do: nothing is done again, and nothing written."""
        parts = self.parts
        parts.reporter.sinks.message(
            f"finished at step {parts.counters.step}: {parts.stopping.reason}; nothing is left to do"
        )
        last = parts.persistence.goes_on_from
        return self._result(last, self._load_best() or last)

    def _load_best(self) -> str | None:
        """Take the weights of the best checkpoint, if that is asked for; its path."""
        best = self.parts.persistence.load_best() if self.config.checkpoint.load_best_model_at_end else None
        if best is None:
            return None
        self.parts.reporter.sinks.message(f"the weights are those of {best}, the best one")
        return str(best)

    def _result(self, checkpoint: str | None, weights: str | None) -> TrainingResult:
        counters, stopping = self.parts.counters, self.parts.stopping
        return TrainingResult(
            initial_loss=nan if counters.initial_loss is None else counters.initial_loss,
            final_loss=nan if counters.final_loss is None else counters.final_loss,
            losses=self.losses,
            steps=counters.step,
            best_eval_loss=stopping.best_loss,
            unigram_loss=self.parts.evaluating.unigram,
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
