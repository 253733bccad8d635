"""What has happened since the last logged line, made into records; rank 0 hands them to the sinks."""

from __future__ import annotations

import logging
import math
import operator
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from moe_dist.config import Config
from moe_dist.models.auxiliary import LoadFacts
from moe_dist.models.counts import expert_share, flops_per_token
from moe_dist.monitor.collector import Collector, Slots
from moe_dist.monitor.devices import peak_flops
from moe_dist.monitor.expert_stats import imbalance_seconds
from moe_dist.monitor.health.diagnosis import Diagnosis
from moe_dist.monitor.health.rules import Finding
from moe_dist.monitor.health.stragglers import Stragglers
from moe_dist.monitor.rank_facts import (
    PHASE_KEYS,
    RankFacts,
    all_to_all_seconds,
    bytes_between_hosts,
    mean_phases,
    over_ranks,
    ranks_record,
)
from moe_dist.monitor.records import (
    ActionRecord,
    CheckpointRecord,
    EvalRecord,
    LayerRecord,
    RunInfo,
    RunSummary,
    TrainRecord,
)
from moe_dist.monitor.sinks import Sinks, build_sinks
from moe_dist.parallel import proven
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.callbacks import Callback, RunState
from moe_dist.train.counters import Counters
from moe_dist.train.dpo import REWARD_FACTS, reward_facts
from moe_dist.train.run_summary import warnings_of
from moe_dist.train.stopping import Stopping

logger = logging.getLogger("moe_dist")


def sinks_of(config: Config, mesh: Mesh) -> Sinks:
    """Those of rank 0; the others have none. Raises ValueError on every rank for files that they cannot use."""
    found = Sinks([])

    def build() -> None:
        found.sinks = build_sinks(config.train.output_dir, config.monitor).sinks

    mesh.ask_rank_zero(build)
    return found


class Reporter(Callback):
    """Gathers facts step by step on every rank; rank 0 gives them to the sinks, once per logging interval."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        clock: Clock,
        sinks: Sinks,
        loads: Callable[[], dict[int, LoadFacts]],
        announce: Callable[[TrainRecord], None],
        num_domains: int = 0,
        slots: Callable[[], Slots] = dict,
        copied: Callable[[], Slots] = dict,
    ) -> None:
        """`loads`: what the layers of this rank have recorded in the last step. `announce` tells all callbacks.
        `slots`, `copied`: as `Collector` has them."""
        self.config, self.mesh, self.clock, self.sinks = config, mesh, clock, sinks
        self._loads, self._announce = loads, announce
        self.diagnosis = Diagnosis()
        self._present: dict[tuple[str, int | None, int | None], Finding] = {}
        self.collector = Collector(
            config.model.moe_layers,
            config.model.num_experts,
            config.model.num_experts_per_tok,
            mesh.device,
            partial(mesh.sum_over, "world"),
            ep_size=mesh.layout.ep_size,
            rank=mesh.rank,
            world_size=mesh.layout.world_size,
            num_domains=num_domains,
            slots=slots,
            copied=copied,
        )
        # Stages of a pipeline do different work; the replicas of one do the same.
        self.stragglers = Stragglers([mesh.layout.coordinates(rank)[0] for rank in range(mesh.layout.world_size)])
        self.flops_per_token = flops_per_token(config.model, config.data.max_seq_length)
        self.expert_share = expert_share(config.model, config.data.max_seq_length)
        self.peak_flops = config.monitor.peak_flops
        if self.peak_flops is None and mesh.device.type == "cuda":
            self.peak_flops = peak_flops(torch.cuda.get_device_name(mesh.device), config.train.bf16)
        self.layers: list[LayerRecord] = []
        self.start_interval()

    def open(self, info: RunInfo) -> None:
        """Say what runs, and open files."""
        self.sinks.open(info)
        if self.mesh.rank == 0:
            if info.world_size > 1:  # one process is what others are held against
                self.sinks.message(proven.line_for(self.config, info.device, info.world_size))
            for warning in warnings_of(self.config):
                logger.warning(warning)
        self.diagnosis.resumed(info)

    def on_run_begin(self, run: RunState) -> None:
        """Training begins: what has taken time before does not count."""
        self.clock.status.take()
        self.start_interval()

    def start_interval(self) -> None:
        """Nothing has happened yet."""
        self._started = self._step_started = time.perf_counter()
        self._tokens = 0
        self._each: dict[str, list[float]] = {}
        self._pairs: list[int] = []
        self._own: list[float] = []
        self._own_before = self.clock.status.own_seconds

    def on_step_end(self, run: RunState) -> None:
        """One more step in the interval, and its line when it is time: the first, the last, and every so many."""
        self._add(run)
        if run.step % self.config.monitor.logging_steps == 0 or run.step == 1 or run.stopping is not None:
            self._log(run)

    def finish(self, run: RunState) -> None:
        """The line of an interval that has been begun (collective): of a run that a callback has ended, say."""
        if self._each:
            self._log(run)

    def _add(self, run: RunState) -> None:
        if run.skipped:
            logger.warning("step %d: loss %s, gradient norm %s; nothing updated", run.step, run.loss, run.grad_norm)
        if not run.num_labels:
            logger.warning("step %d: no token of the whole batch has a label; there is no loss", run.step)
        before, self._step_started = self._step_started, time.perf_counter()
        values = {
            "loss": run.loss if run.num_labels else 0.0,
            "learning_rate": run.learning_rate,
            "grad_norm": run.grad_norm,
            "tokens_per_second": run.num_tokens / max(1e-9, self._step_started - before),
        }
        if self.config.learns_preferences:
            values |= reward_facts(run.rewards) or dict.fromkeys(REWARD_FACTS, 0.0)
            self._pairs.append(run.num_labels)
        for name, value in values.items():
            self._each.setdefault(name, []).append(value)
        self.collector.add(self._loads())
        self._tokens += run.num_tokens
        own = self.clock.status.own_seconds
        self._own.append(own - self._own_before)
        self._own_before = own

    @contextmanager
    def paused(self) -> Iterator[None]:
        """An evaluation or a save inside is no training time."""
        before = time.perf_counter()
        yield
        seconds = time.perf_counter() - before
        self._started += seconds
        self._step_started += seconds

    def _log(self, run: RunState) -> None:
        """End the interval and tell the sinks (collective: one reduction of all facts)."""
        status, traffic = self.clock.status, self.clock.take_traffic()
        status.at("agreeing on the next step")  # the reduction below waits for the slowest rank
        phases, ways = status.take(), self.clock.take()
        ep_size = self.mesh.layout.ep_size
        # A rank without experts has sent nothing to anybody; its row is as long as the others'.
        nothing = (0,) * ep_size if ep_size > 1 else ()
        mine = RankFacts(
            own_seconds=statistics.median(self._own),
            phase_seconds=[phases[phase] for phase in PHASE_KEYS.values()],
            dispatch_seconds=ways["dispatch"],
            combine_seconds=ways["combine"],
            received_rows=traffic.received_rows,
            memory_bytes=peak_memory(self.mesh.device),
            rows_to=traffic.rows_to or nothing,
            bytes_to=traffic.bytes_to or nothing,
        )
        self.layers, rows = self.collector.take_all(mine.row())
        status.at("logging")
        seconds = max(1e-9, time.perf_counter() - self._started)
        losses = self._each.get("loss", [])
        steps, num_ranks = max(1, len(losses)), len(rows)
        step_seconds = seconds / steps
        facts = [mine.of_row(row) for row in rows]
        ranks, phase_seconds = ranks_record(facts, steps), mean_phases(facts)
        flops = self.flops_per_token * self._tokens / seconds
        peak = self.peak_flops
        received = sum(ranks.received_rows)
        stragglers = self.stragglers.observe(ranks.own_seconds, step_seconds)
        record = TrainRecord(
            step=run.step,
            max_steps=run.max_steps,
            epoch=run.epoch,
            loss=losses[-1],
            learning_rate=run.learning_rate,
            grad_norm=run.grad_norm,
            tokens=run.tokens,
            tokens_per_second=self._tokens / seconds,
            tokens_per_second_per_device=self._tokens / seconds / num_ranks,
            loss_std=statistics.pstdev(finite) if (finite := [x for x in losses if math.isfinite(x)]) else 0.0,
            step_seconds=step_seconds,
            all_to_all_share=min(1.0, all_to_all_seconds(ranks, ep_size) / step_seconds),
            # The longest: the others wait for that rank too, in their all-to-all.
            data_wait_share=min(1.0, max(ranks.phase_seconds["data"]) / step_seconds),
            skipped_steps=run.skipped_steps,
            elapsed_seconds=run.elapsed,
            remaining_seconds=self._remaining(run, step_seconds),
            layers=self.layers,
            phase_seconds=phase_seconds,
            flops_per_second=flops,
            samples_per_second=steps * self.config.global_batch_size(num_ranks) / seconds,
            device_utilisation=device_utilisation(self.mesh.device) if self.mesh.rank == 0 else None,
            mfu=None if peak is None else flops / (peak * num_ranks),
            all_to_all_bytes=round(sum(ranks.sent_bytes) / steps),
            all_to_all_bytes_between_hosts=round(bytes_between_hosts(ranks, self.diagnosis.pace.hosts) / steps),
            row_imbalance=max(ranks.received_rows) * num_ranks / received if received else 0.0,
            imbalance_seconds=imbalance_seconds(self.layers, phase_seconds["computing"] / steps * self.expert_share),
            slowest_rank_ratio=self.stragglers.slowest_ratio,
            stragglers=stragglers,
            ranks=ranks,
            steps=self._each,
            **over_ranks(ranks),
            **self._rewards(),
        )
        self.sinks.train(record)
        self._say(self.diagnosis.train(record))
        self.start_interval()
        status.at("agreeing on the next step")  # with rank 0, which has written its line first
        self._announce(record)

    def _rewards(self) -> dict[str, Any]:
        """Means over the pairs of the interval; nothing without any."""
        pairs = sum(self._pairs)
        if not pairs:
            return {}
        return {name: sum(map(operator.mul, self._each[name], self._pairs)) / pairs for name in REWARD_FACTS}

    def _remaining(self, run: RunState, step_seconds: float) -> float | None:
        ends = []
        if run.max_steps is not None:
            ends.append((run.max_steps - run.step) * step_seconds)
        if self.config.train.max_time is not None:
            ends.append(max(0.0, self.config.train.max_time - run.elapsed))
        return min(ends) if ends else None

    def on_evaluate(self, run: RunState, record: EvalRecord) -> None:
        """A finished evaluation."""
        self.sinks.evaluation(record)
        self._say(self.diagnosis.evaluation(record))

    def on_save(self, run: RunState, record: CheckpointRecord) -> None:
        """A save that has ended, well or not."""
        self.sinks.checkpoint(record)
        self._say(self.diagnosis.checkpoint(record, time.time()))

    def actions(self, done: list[ActionRecord]) -> None:
        """Automatic changes of balancing."""
        for record in done if self.mesh.rank == 0 else ():
            self.sinks.action(record)
            logger.warning("step %d: %s", record.step, record.words)

    def _say(self, found: list[Finding]) -> None:
        """What the trainer has not said itself, on the one rank that speaks; and in its log what is over."""
        if self.mesh.rank != 0:
            return
        for finding in found:
            if finding.kind not in ("skipped_steps", "checkpoint_failed"):
                logger.log(logging.INFO if finding.severity == "info" else logging.WARNING, "%s", finding)
        now = {(finding.kind, finding.layer, finding.rank): finding for finding in self.diagnosis.present}
        for key in self._present.keys() - now.keys():
            logger.info("over: %s", self._present[key])
        self._present = now

    def summary(
        self, counters: Counters, stopping: Stopping, unigram: float | None, checkpoint: str | None, **samples: Any
    ) -> None:
        """The end of a run. `checkpoint`: the last complete one. `samples` of text, as `RunSummary` names them."""
        folder = self.config.train.output_dir
        paths = {"run folder": str(folder), "metrics": str(folder / "metrics.jsonl")}
        if self.config.monitor.tensorboard:
            paths["TensorBoard"] = str(folder / "tb")
        if checkpoint is not None:
            paths["checkpoint"] = checkpoint
        self.sinks.summary(
            RunSummary(
                steps=counters.step,
                seconds=counters.elapsed,
                initial_loss=counters.initial_loss,
                final_loss=math.nan if counters.final_loss is None else counters.final_loss,
                best_eval_loss=stopping.best_loss,
                unigram_loss=unigram,
                tokens=counters.tokens,
                tokens_per_second=counters.tokens / max(1e-9, counters.elapsed),
                skipped_steps=counters.skipped,
                reason=stopping.reason or "",
                failed=stopping.failed,
                layers=self.layers,
                paths=paths,
                **samples,
            )
        )


def device_utilisation(device: torch.device) -> float | None:
    """Share of the last second in which the GPU had work, 0..1, by the driver; None where that cannot be asked."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # no NVML, no bindings for it, a device that does not tell: each raises another error
        return None


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on CUDA, resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
