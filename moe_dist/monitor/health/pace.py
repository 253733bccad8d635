"""Whether a run is as fast as its machines allow: data, communication, utilisation, throughput, stragglers."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from moe_dist.monitor.health.advice import Advice
from moe_dist.monitor.health.rules import LONG_PATIENCE, PATIENCE, Conditions, Finding
from moe_dist.monitor.rank_facts import PHASE_KEYS
from moe_dist.monitor.records import RanksRecord, RunInfo, TrainRecord

STARVED = 0.2
"""Share of step time waiting for a batch."""
TALKATIVE = 0.5
"""Share of step time in all-to-all."""
LOW_MFU = 0.1
IDLE = 0.7
"""Share of the time in which a GPU has work, below which it is badly used."""
FEW_SAMPLES = 0.5
"""Sequences per second of a whole run that will hardly end."""
SLOWER = 0.75
"""Median throughput of ten intervals / highest such median before."""
UNEQUAL_ROWS = 1.5
"""Rows of a straggler / median of the others from which on its load is the likelier cause."""


class Pace:
    """Findings about speed; a start on other machines forgets them."""

    def __init__(self, conditions: Conditions) -> None:
        self.conditions, self.advice = conditions, Advice()
        self.hosts: list[str] = []
        self.stages: list[int] = []
        self._stragglers: set[int] = set()
        self._recent: deque[TrainRecord] = deque(maxlen=LONG_PATIENCE)
        self._fastest = 0.0
        self._phases_then: dict[str, float] = {}

    def resumed(self, info: RunInfo, advice: Advice, step: int | None) -> None:
        """A start of the run."""
        elsewhere = list(info.hosts) != self.hosts
        self.hosts, self.stages, self.advice = list(info.hosts), list(info.stage_of_rank), advice
        self.conditions.end_all(step)
        self._stragglers.clear()
        self._recent.clear()
        if elsewhere or not self.hosts:
            self._fastest, self._phases_then = 0.0, {}

    def observe(self, record: TrainRecord) -> list[Finding]:
        """A logging interval."""
        return [*self._shares(record), *self._throughput(record), *self._straggling(record)]

    def _shares(self, record: TrainRecord) -> list[Finding]:
        step, wait, talk, watch = record.step, record.data_wait_share, record.all_to_all_share, self.conditions.observe
        workers, batch_key = "data.dataloader_num_workers", "train.per_device_train_batch_size"

        def starved() -> Finding:
            words = f"{wait:.0%} of the time went into waiting for data; {self.advice.workers}"
            return Finding("data_starved", "warning", words, workers, step, evidence={"data_wait_share": wait})

        def talkative() -> Finding:
            words = f"{talk:.0%} of the time goes into all-to-all; {self.advice.less_traffic}"
            numbers = {"all_to_all_share": talk, "all_to_all_bytes": float(record.all_to_all_bytes)}
            return Finding("all_to_all_bound", "warning", words, "parallel.ep_size", step, evidence=numbers)

        def low_mfu() -> Finding:
            words = (
                f"the devices do {record.mfu or 0.0:.1%} of what they can, most of the time goes into "
                f"{_largest(record.phase_seconds)}; {self.advice.bigger_work}"
            )
            numbers = {"mfu": record.mfu or 0.0, **record.phase_seconds}
            return Finding("low_mfu", "warning", words, batch_key, step, evidence=numbers)

        def idle() -> Finding:
            words = (
                f"the GPU has work {busy:.0%} of the time, most of a step goes into "
                f"{_largest(record.phase_seconds)}; {self.advice.bigger_work}"
            )
            return Finding("low_utilisation", "warning", words, batch_key, step, evidence={"device_utilisation": busy})

        def few() -> Finding:
            words = (
                f"{record.samples_per_second or 0.0:.2f} sequences per second, of all ranks together, most of the time "
                f"goes into {_largest(record.phase_seconds)}; a smaller model or data.max_seq_length, or more ranks"
            )
            numbers = {"samples_per_second": record.samples_per_second or 0.0}
            return Finding("few_samples", "warning", words, "data.max_seq_length", step, evidence=numbers)

        shares = [one.device_utilisation for one in (*self._recent, record) if one.device_utilisation is not None]
        busy = statistics.median(shares) if shares else 1.0
        slow = record.mfu is not None and record.mfu < LOW_MFU
        rare = record.samples_per_second is not None and record.samples_per_second < FEW_SAMPLES
        return [
            *watch("starved", wait > STARVED, PATIENCE, step, starved),
            *watch("talkative", talk > TALKATIVE, LONG_PATIENCE, step, talkative),
            *watch("low mfu", slow, LONG_PATIENCE, step, low_mfu),
            *watch("idle", busy < IDLE, LONG_PATIENCE, step, idle),
            *watch("few samples", rare, LONG_PATIENCE, step, few),
        ]

    def _throughput(self, record: TrainRecord) -> list[Finding]:
        self._recent.append(record)
        if len(self._recent) < LONG_PATIENCE:
            return []
        now, before = statistics.median(one.tokens_per_second for one in self._recent), self._fastest
        phases = {
            key: statistics.median(one.phase_seconds.get(key, 0.0) / one.step_seconds for one in self._recent)
            for key in record.phase_seconds
            if key not in ("evaluation", "checkpoint") and record.step_seconds
        }
        then = self._phases_then
        if now > before:
            self._fastest, self._phases_then = now, phases

        def dropped() -> Finding:
            grown = max(phases, key=lambda key: phases[key] - then.get(key, 0.0), default="computing")
            words = (
                f"throughput fell from {before:,.0f} to {now:,.0f} tokens per second, most of it {PHASE_KEYS[grown]}; "
                "look for other processes on the machines, clocks that were lowered, a slow disk or network"
            )
            numbers = {"tokens_per_second": now, "before": before}
            return Finding("throughput_drop", "warning", words, "", record.step, evidence=numbers)

        return self.conditions.observe("dropped", now < SLOWER * before, PATIENCE, record.step, dropped)

    def _straggling(self, record: TrainRecord) -> list[Finding]:
        new = [rank for rank in record.stragglers if rank not in self._stragglers]
        for rank in self._stragglers.difference(record.stragglers):
            self.conditions.end(("straggler", rank), record.step)
        self._stragglers = set(record.stragglers)
        ranks = record.ranks
        if ranks is None:
            return []
        found = [straggler(rank, ranks, record.step, self.hosts, self.stages, self.advice) for rank in new]
        return [self.conditions.begin(("straggler", finding.rank), finding) for finding in found]


def _largest(phase_seconds: dict[str, float]) -> str:
    shown = {key: phase_seconds.get(key, 0.0) for key in ("data", "computing", "all_to_all", "gradients")}
    return PHASE_KEYS[max(shown, key=lambda key: shown[key])]


def straggler(
    rank: int,
    ranks: RanksRecord,
    step: int | None,
    hosts: Sequence[str],
    stages: Sequence[int] = (),
    advice: Advice | None = None,
) -> Finding:
    """A slow rank with its host, the phase in which it loses most, and whether its load explains it; the others are
    those of its pipeline stage, which do the same work.
    """
    everyone, advice = range(len(ranks.own_seconds)), advice or Advice()
    alike = [one for one in everyone if one != rank and (not stages or stages[one] == stages[rank])]

    def others(values: Sequence[float]) -> float:
        return statistics.median(values[index] for index in alike)

    own, usual = ranks.own_seconds[rank], others(ranks.own_seconds)
    lost = {
        key: ranks.phase_seconds[key][rank] - others(ranks.phase_seconds[key])
        for key in ("data", "computing", "optimizer")
        if key in ranks.phase_seconds
    }
    phase = max(lost, key=lambda key: lost[key])
    host = f" on {hosts[rank]}" if rank < len(hosts) else ""
    rows = ranks.received_rows[rank] / max(1.0, others(ranks.received_rows))
    key, remedy = "", "look at that machine: other processes, clock, memory, disk"
    if phase == "data":
        key, remedy = "data.dataloader_num_workers", f"its data is slow: {advice.workers}, or its disk"
    elif rows >= UNEQUAL_ROWS:
        key = "balance.bias_update_rate"
        remedy = f"it gets {rows:.1f} times the rows of the others: {advice.change(key, 2.0, 1e-3)}"
    words = (
        f"rank {rank}{host} takes {own / max(usual, 1e-9):.1f} times as long as the others, most of it "
        f"{PHASE_KEYS[phase]} ({1000 * own:.0f} ms a step against {1000 * usual:.0f}); {remedy}"
    )
    numbers = {"own_seconds": own, "others": usual, "lost_seconds": lost[phase], "rows_ratio": rows}
    return Finding("straggler", "warning", words, key, step, rank=rank, evidence=numbers)
