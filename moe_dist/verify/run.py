"""Run the proof on ranks that are already connected, and say what came out."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from moe_dist.config import Config
from moe_dist.config_loading import ConfigError
from moe_dist.monitor.sinks.jsonl import json_safe
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Mesh
from moe_dist.verify.layouts import BUGS, Case, cases, shrunken
from moe_dist.verify.trial import BF16_TOLERANCE, COMPARED, TOLERANCE, Told, deviations, passes, run_trial


@dataclass(frozen=True)
class Verdict:
    """One layout: largest relative differences of any rank from one process, by what was compared, and the ranks that
    differ too much.
    """

    name: str
    worst: dict[str, float]
    failed_on: list[int]
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.failed_on


class Verifier:
    """Holds layouts of the ranks of `world` against one process; every rank makes one and calls `verify`.

    Process groups and what one process computes are kept between calls.
    """

    def __init__(self, world: Mesh) -> None:
        self.world = world
        self._meshes: dict[tuple[int, int, int | None], Mesh] = {}
        self._references: dict[tuple[str, int], Told] = {}

    def verify(self, config: Config, layouts: str = "all", plant: str | None = None, as_json: bool = False) -> bool:
        """Train a shrunken model for three steps under each layout and hold it against one process.

        Every rank compares its own copies. Rank 0 prints a table, or JSON. `plant`: a known bug of `BUGS` is in the
        system while layouts run (never in the reference). Returns whether every layout passed, on every rank. Raises
        ConfigError as `cases` does, and RuntimeError with the layout's name for an error in a layout, after what
        there is has been printed.
        """
        size = self.world.layout.world_size
        deep = shrunken(config, size, plant)
        chosen = cases(deep, size, layouts)
        told = Telling(self.world.rank == 0, plant, as_json)
        told.begin(size, deep.model.num_experts, chosen)
        for case in chosen:
            started = time.perf_counter()
            try:
                small = shrunken(config, size, plant, case.applied(deep, size).parallel.num_stages)
                ranks = self._compare(case, case.applied(small, size), small, plant)
            except Exception as error:
                told.end(broken=case)
                if isinstance(error, ConfigError):
                    raise
                raise RuntimeError(f"layout {case.name}: {type(error).__name__}: {error}") from error
            worst = {column: max(rank[column] for rank in ranks) for column in COMPARED}
            failed_on = [number for number, rank in enumerate(ranks) if not passes(rank, case.bf16)]
            told.add(Verdict(case.name, worst, failed_on, time.perf_counter() - started))
        told.end()
        return not told.failed

    def _compare(self, case: Case, config: Config, small: Config, plant: str | None) -> list[dict[str, float]]:
        """Deviations of every rank; each sees its own copies, and what its `ep` and `pp` peers hold besides."""
        mesh = self._mesh(case)
        count = mesh.layout.dp_size * case.accumulation
        found = run_trial(config, mesh, count, plant=plant)
        return self.world.from_all(deviations(found, self._reference(small, count)))

    def _mesh(self, case: Case) -> Mesh:
        if not dist.is_initialized():
            return self.world
        key = (case.pp_size, case.ep_size, case.shard_size)
        if key not in self._meshes:  # kept: every process group has threads
            layout = Layout(self.world.layout.world_size, case.pp_size, case.ep_size)
            self._meshes[key] = Mesh.create(layout, self.world.device, case.shard_size)
        return self._meshes[key]

    def _reference(self, config: Config, count: int) -> Told:
        """What rank 0 computes alone, on every rank."""
        key = (config.model_dump_json(), count)
        if key not in self._references:
            # Ranks are held against one of their kind; a single process, on a GPU perhaps, against the CPU.
            device = self.world.device if self.world.layout.world_size > 1 else "cpu"
            self._references[key] = self.world.ask_rank_zero(lambda: run_trial(config, Mesh.single(device), count))
        return self._references[key]


class Telling:
    """What rank 0 prints: a line before, a table for people after, or one JSON object on standard output."""

    def __init__(self, speaks: bool, plant: str | None, as_json: bool) -> None:
        self.speaks, self.plant, self.as_json = speaks, plant, as_json
        self.verdicts: list[Verdict] = []
        self.console = Console(stderr=as_json, highlight=False, quiet=not speaks)
        if not self.console.is_terminal:  # nobody's window to fit into: a layout stays on its line
            self.console.width = max(self.console.width, 120)

    @property
    def failed(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if not verdict.passed]

    def begin(self, size: int, num_experts: int, chosen: list[Case]) -> None:
        self.size, self.count = size, len(chosen)
        options = ", ".join(f"{key}={value}" for key, value in BUGS.get(self.plant or "", {}).items())
        bug = f" with the bug {self.plant} planted{f' ({options})' if options else ''}" if self.plant else ""
        self.console.print(
            f"Verifying {len(chosen)} layouts of {size} ranks{bug}: three steps of a small "
            f"{num_experts}-expert model against one process, tolerance {TOLERANCE:g}{_bf16(chosen)}."
        )

    def add(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        if self.console.is_terminal and not self.as_json:
            self.console.print(f"[dim]{len(self.verdicts)}/{self.count} {verdict.name:<60}[/dim]", end="\r")

    def end(self, broken: Case | None = None) -> None:
        """`broken`: the layout at which everything ended, with an error."""
        if not self.speaks:
            return
        if self.as_json:
            self._print_json(broken)
            return
        self.console.print(self._table())
        failed, count = self.failed, len(self.verdicts)
        if broken is not None:
            self.console.print(f"[bold red]{broken.name} ended with an error; {count} layouts were done[/bold red]")
        elif failed:
            self.console.print(f"[bold red]{len(failed)} of {count} layouts differ from one process[/bold red]")
        elif self.plant:
            self.console.print(f"[bold red]The bug {self.plant} was not seen: {count} layouts pass with it[/bold red]")
        else:
            self.console.print(f"[bold]All {count} layouts compute what one process computes.[/bold]")

    def _print_json(self, broken: Case | None) -> None:
        rows = [
            {"layout": v.name, "passed": v.passed, "failed_on": v.failed_on, "seconds": round(v.seconds, 3), **v.worst}
            for v in self.verdicts
        ]
        passed = not self.failed and broken is None
        told = {"tolerance": TOLERANCE, "plant": self.plant, "broken": broken and broken.name, "passed": passed}
        json.dump(json_safe({**told, "layouts": rows}), sys.stdout, indent=1, allow_nan=False)
        print(flush=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("layout", header_style="dim", overflow="fold")
        for column in COMPARED:
            table.add_column(column, justify="right", header_style="dim", no_wrap=True, min_width=len("gradients"))
        table.add_column("", header_style="dim", no_wrap=True, min_width=4)
        for verdict in self.verdicts:
            cells = [f"{verdict.worst[column]:.1e}" if verdict.worst[column] else "0" for column in COMPARED]
            some = f" on {', '.join(map(str, verdict.failed_on))}" if len(verdict.failed_on) < self.size else ""
            table.add_row(verdict.name, *cells, "pass" if verdict.passed else f"[bold red]FAIL[/bold red]{some}")
        return table


def _bf16(chosen: list[Case]) -> str:
    if not any(case.bf16 for case in chosen):
        return ""
    return f" (bf16: {', '.join(f'{name} {tolerance:g}' for name, tolerance in BF16_TOLERANCE.items())})"
