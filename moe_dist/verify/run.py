"""Run the proof on ranks that are already connected, and say what came out."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moe_dist.config import Config, ConfigError
from moe_dist.parallel.dispatch_choice import hosts_for
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.proven import Proof
from moe_dist.verify.cases import Chosen, choose, named_case
from moe_dist.verify.design import Designer
from moe_dist.verify.features import ONCE
from moe_dist.verify.injected_bugs import REACHED
from moe_dist.verify.layouts import Case
from moe_dist.verify.life import Life
from moe_dist.verify.scenarios import Scenario, Smallness, Training
from moe_dist.verify.trajectory import Alone, run_life
from moe_dist.verify.trial import TrialResult, deviations, run_trial
from moe_dist.verify.verdicts import Report, Verdict

_PATIENCE = timedelta(seconds=25)
"""For what other ranks say when this one has failed; they may be waiting for it in a collective."""
_KEPT = 64
"""What one process computed of so many trainings; cases of the same training mostly follow each other."""
_SHRUNKEN = 5
"""Cases that fail are made smaller until so many have been; there may be one mistake behind all."""


_ROUNDS = itertools.count()
"""Of this process, the same on every rank: the store keeps what was said in earlier ones."""


class Crash(RuntimeError):
    """A rank failed alone: the others wait for it, and only a new start helps."""


class Verifier:
    """Holds cases on the ranks of `world` against one process; every rank makes one and calls `verify`.

    Process groups and what one process computes are kept between calls.
    """

    def __init__(self, world: Mesh) -> None:
        self.world = world
        self._meshes: dict[tuple[int, int, int | None, int | None], Mesh] = {}
        self._references: dict[str, TrialResult] = {}
        self.alone = Alone()

    def verify(
        self,
        config: Config,
        layouts: str = "all",
        plant: str | None = None,
        *,
        seed: int = 0,
        minutes: float | None = None,
        report: Report | None = None,
    ) -> bool:
        """Train small models under each case and hold them against one process.

        Every rank compares its own copies. Rank 0 prints lines and a summary, or JSON. `plant`: a known bug of `BUGS`
        is in the system while layouts run (never in the reference). `minutes`: go on with cases drawn at random.
        Returns whether every case passed, on every rank. Raises ConfigError as `choose` does, and when no case has
        called what `plant` replaces; Crash when a case fails on some ranks only.
        """
        reached = REACHED[plant]
        report = report or Report("moe-dist verify CONFIG")
        report.plant = plant
        if self.world.rank:
            report.silence()
        size = self.world.layout.world_size
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)  # pages about every error
        small = Smallness(config, size, plant)
        chosen: Chosen = self.world.ask_rank_zero(lambda: choose(small, layouts, seed))
        done = self.world.ask_rank_zero(report.take_earlier)
        report.coverage = chosen.coverage
        bug = f" with the bug {plant} planted" if plant else ""
        report.say(f"Verifying {len(chosen.cases)} cases on {size} ranks{bug}, each against one process.")
        cases = self._with_random(chosen.cases, small, seed, minutes)
        waiting: list[Scenario | Life] = []
        for case in cases:
            if case.name in done:
                continue
            waiting.append(case)
            if len(waiting) == size:
                self._run(waiting, small, plant, report)
                waiting = []
        self._run(waiting, small, plant, report)
        self.alone.forget()
        # After a crash it may have been reached in cases that are done.
        if plant and not done and not sum(self.world.from_all(REACHED[plant] - reached)):
            raise ConfigError(
                f"--inject-bug {plant}: nothing has called what it replaces in {len(report.verdicts)} cases, which say "
                "nothing of it; choose cases in which it acts with --layouts"
            )
        report.proof = proof_of(report, small, self.world.device.type)
        return self.world.ask_rank_zero(report.end)

    def _with_random(
        self, cases: list[Scenario | Life], small: Smallness, seed: int, minutes: float | None
    ) -> Iterator[Scenario | Life]:
        yield from cases
        if minutes is None:
            return
        until = time.monotonic() + 60 * minutes
        drawn = Designer(small, seed).forever()
        while self.world.ask_rank_zero(lambda: time.monotonic() < until):
            yield next(drawn)

    def _run(self, cases: list[Scenario | Life], small: Smallness, plant: str | None, report: Report) -> None:
        self._prepare([case for case in cases if isinstance(case, Scenario)], small)
        if lives := [case for case in cases if isinstance(case, Life)]:
            self.alone.prepare(lives, small, self.world)
        for case in cases:
            report.begin(case.name)
            verdict = self.verdict(case, small, plant)
            report.add(verdict)
            if not verdict.passed and isinstance(case, Scenario) and plant is None:
                failed = self.world.ask_rank_zero(lambda: len(report.failed))
                if failed <= _SHRUNKEN:
                    report.shrunk(case.name, self._smallest(case, small).name)

    def _smallest(self, case: Scenario, small: Smallness) -> Scenario:
        """The case with as few features as it still fails with: one after the other is left out."""
        for word in sorted(
            case.features or (), key=lambda word: (word not in ONCE, word)
        ):  # what costs most goes first
            simpler = replace(case, features=(case.features or frozenset()) - {word})
            if small.refusal(simpler) is None and not self.verdict(simpler, small, None).passed:
                case = simpler
        return case

    def verdict(self, case: Scenario | Life, small: Smallness, plant: str | None) -> Verdict:
        """Of one case (collective); the same on every rank. `plant`: a bug that is in the system meanwhile."""
        started = time.perf_counter()
        ranks, error = self._together(lambda: self._compare(case, small, plant))
        worst: dict[str, float] = {}
        failed_on: list[int] = []
        if error is None:
            worst = {column: max(rank[column] for rank in ranks) for column in ranks[0]}
            failed_on = [number for number, rank in enumerate(ranks) if not case.passes(rank)]
        seconds = time.perf_counter() - started
        return Verdict(case.name, case.precision, worst, failed_on, seconds, case.tolerances, error)

    def _compare(self, case: Scenario | Life, small: Smallness, plant: str | None) -> dict[str, float]:
        """Deviations on this rank; each sees its own copies, and what its `ep` and `pp` peers hold besides."""
        if isinstance(case, Life):
            return run_life(case, small, self.world, self.mesh, plant, self.alone)
        training = small.training(case)
        mesh = self.mesh(case.layout, hosts_for(training.config, None))
        count = self._count(case)
        found = run_trial(training.config, mesh, count, plant, training.batches, case.precision)
        return deviations(found, self._reference(case, training, count), case.precision)

    def _together(self, compare: Callable[[], dict[str, float]]) -> tuple[list[dict[str, float]], str | None]:
        """What every rank has found, or the error that one of them has met, the same on every rank. An error that all
        meet, or that one meets when all have finished, leaves the ranks in step. Raises Crash otherwise.
        """
        found: dict[str, float] = {}
        error: str | None = None
        try:
            found = compare()
        except ConfigError:
            raise
        except Exception as caught:
            error = _first_line(caught)
        if self.world.group("world") is None:
            return [found], error
        store, number = dist.distributed_c10d._get_default_store(), next(_ROUNDS)
        store.set(f"verify/{number}/{self.world.rank}", error or "")
        keys = [f"verify/{number}/{rank}" for rank in range(self.world.layout.world_size)]
        if error is not None:
            try:
                store.wait(keys, _PATIENCE)
            except Exception as late:
                raise Crash(error) from late
        errors = [store.get(key).decode() for key in keys]
        error = next((text for text in errors if text), None)
        return ([found] if error else self.world.from_all(found)), error

    def mesh(self, layout: Case, hosts: int | None = None) -> Mesh:
        """The mesh of a layout; `hosts`: ranks on each, as of `hosts_for`. Kept: every process group has threads."""
        if not dist.is_initialized():
            return self.world
        key = (layout.pp_size, layout.ep_size, layout.shard_size, hosts)
        if key not in self._meshes:
            ranks = Layout(self.world.layout.world_size, layout.pp_size, layout.ep_size)
            self._meshes[key] = Mesh.create(ranks, self.world.device, layout.shard_size, hosts)
        return self._meshes[key]

    def _count(self, case: Scenario) -> int:
        """Micro-batches of a step."""
        return self.world.layout.world_size // case.layout.pp_size * case.layout.accumulation

    def _prepare(self, cases: list[Scenario], small: Smallness) -> None:
        """What one process computes, for several cases at the same time: a rank each."""
        if len(self._references) > _KEPT:
            self._references.clear()
        missing: dict[str, tuple[Scenario, Training, int]] = {}
        for case in cases:
            training, count = small.training(case), self._count(case)
            key = self._key(case, training, count)
            if key not in self._references:
                missing[key] = (case, training, count)
        mine: dict[str, TrialResult | None] = {}
        for number, (key, (case, training, count)) in enumerate(missing.items()):
            if number % self.world.layout.world_size == self.world.rank:
                try:
                    mine[key] = self._alone(case, training, count)
                except Exception:  # met again, and named, by the case itself
                    mine[key] = None
        for part in self.world.from_all(mine):
            self._references |= {key: reference for key, reference in part.items() if reference is not None}

    def _reference(self, case: Scenario, training: Training, count: int) -> TrialResult:
        """What one process computes, on every rank."""
        key = self._key(case, training, count)
        if key not in self._references:
            self._references[key] = self.world.ask_rank_zero(lambda: self._alone(case, training, count))
        return self._references[key]

    def _alone(self, case: Scenario, training: Training, count: int) -> TrialResult:
        # Ranks are held against one of their kind; a single process, on a GPU perhaps, against the CPU.
        device: Any = self.world.device if self.world.layout.world_size > 1 else "cpu"
        return run_trial(training.alone, Mesh.single(device), count, None, training.batches, case.precision)

    @staticmethod
    def _key(case: Scenario, training: Training, count: int) -> str:
        return f"{training.alone.model_dump_json()} {count} {training.batches} {case.precision}"


def proof_of(report: Report, small: Smallness, device: str) -> Proof:
    """What the verdicts say about the layouts they are of."""
    configs: list[tuple[Config, bool]] = []
    for verdict in report.verdicts:
        case = named_case(verdict.name)
        if isinstance(case, Life):
            configs += [(case.config(small, layout), verdict.passed) for layout in case.layouts]
        else:
            configs.append((small.training(case).config, verdict.passed))
    return Proof.of(configs, device, small.world_size)


def _first_line(error: BaseException) -> str:
    """The cause at the bottom, in one line: schedules of pipelines wrap it in pages of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
