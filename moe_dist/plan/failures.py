"""What failures and checkpoints leave of a rate: expected, and replayed from a seed."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Reliability:
    """Of a run on many devices; seconds."""

    mtbf: float
    """Mean time between failures of any device of the run."""
    save: float
    """How long a checkpoint stops training."""
    restart: float
    """From a failure to the first step after it."""

    @property
    def best_interval(self) -> float:
        """Between checkpoints, such that least is lost (Daly 2006, doi:10.1016/j.future.2004.11.016, equation 37).

        It is Young's sqrt(2 save mtbf) where saving is short against failures.
        """
        save, mtbf = self.save, self.mtbf
        if save >= 2 * mtbf:
            return mtbf
        root = math.sqrt(save / (2 * mtbf))
        return math.sqrt(2 * save * mtbf) * (1 + root / 3 + save / (18 * mtbf)) - save

    def goodput(self, interval: float) -> float:
        """Expected share of the time that makes progress, 0..1: Daly's complete model of exponential failures."""
        mtbf, whole = self.mtbf, interval + self.save
        needed = mtbf * math.exp(self.restart / mtbf) * math.expm1(whole / mtbf) if whole / mtbf < 700 else math.inf
        return interval / needed


@dataclass(frozen=True)
class Replay:
    """What became of one month: shares of its time, and how often it failed."""

    goodput: float
    lost: float
    """Steps that were done again."""
    saving: float
    restarting: float
    slow: float
    """Waiting for a slow device."""
    failures: int


def replay(
    run: Reliability,
    interval: float,
    seed: int,
    *,
    duration: float = 30 * 86400.0,
    stragglers_per_day: float = 1.0,
    slowdown: float = 0.15,
    straggler_seconds: float = 3600.0,
) -> Replay:
    """`duration` seconds of training with a checkpoint every `interval` seconds of progress.

    Failures and stragglers come at random (exponential times), all from `seed`; a straggler slows all ranks by
    `slowdown`. A failure while restarting starts that again.
    """
    rng = random.Random(seed)
    events: list[tuple[float, str]] = []
    heapq.heappush(events, (rng.expovariate(1 / run.mtbf), "failure"))
    if stragglers_per_day:
        heapq.heappush(events, (rng.expovariate(stragglers_per_day / 86400), "slow"))
    now = done = lost = saving = restarting = slow_time = 0.0
    since_save = 0.0  # progress that a failure would take
    slow_until = 0.0
    failures = 0

    def next_failure() -> float:
        return events[0][0]

    while now < duration:
        if next_failure() <= now:
            at, kind = heapq.heappop(events)
            if kind == "slow":
                slow_until = max(slow_until, at + straggler_seconds)
                heapq.heappush(events, (at + rng.expovariate(stragglers_per_day / 86400), "slow"))
                continue
            failures += 1
            lost, done, since_save = lost + since_save, done - since_save, 0.0
            again = max(now, at)
            after = at + rng.expovariate(1 / run.mtbf)
            while after < again + run.restart:  # fails before it has come back
                failures, again, after = failures + 1, after, after + rng.expovariate(1 / run.mtbf)
            restarting += again + run.restart - now
            now, slow_until = again + run.restart, 0.0  # slow devices are left out
            heapq.heappush(events, (after, "failure"))
            continue
        speed = 1 / (1 + slowdown) if now < slow_until else 1.0
        until = min(next_failure(), now + (interval - since_save) / speed, duration)
        if now < slow_until:
            until = min(until, slow_until)
        progress = (until - now) * speed
        done, since_save, slow_time = done + progress, since_save + progress, slow_time + (until - now) - progress
        now = until
        if since_save >= interval * (1 - 1e-9) and now < next_failure():
            end = min(now + run.save, next_failure())
            saving += end - now
            if end - now >= run.save * (1 - 1e-9):
                since_save = 0.0
            now = end
    share = 1 / max(now, duration)
    return Replay(done * share, lost * share, saving * share, restarting * share, slow_time * share, failures)


def quantiles(values: list[float], shares: tuple[float, ...] = (0.05, 0.5, 0.95)) -> list[float]:
    """Of a list, by the nearest rank."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in shares]
