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
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Mesh
from moe_dist.verify.layouts import Case, cases, shrunken
from moe_dist.verify.trial import TOLERANCE, Told, deviations, passes, run_trial

COLUMNS = ("initial", "losses", "gradients", "norms", "weights", "biases")


@dataclass(frozen=True)
class Verdict:
    """One layout: largest relative differences from one process, by what was compared."""

    name: str
    worst: dict[str, float]
    seconds: float

    @property
    def passed(self) -> bool:
        return passes(self.worst)


def verify(config: Config, world: Mesh, layouts: str = "all", plant: str | None = None, as_json: bool = False) -> bool:
    """Train a shrunken model for three steps under each layout and hold it against one process.

    Every rank of `world` calls this; rank 0 prints a table, or JSON. `plant`: a known bug from `PLANTS` is in the
    system while layouts run (never in the reference). Returns whether every layout passed, on every rank.
    """
    size = world.layout.world_size
    small = shrunken(config, size)
    console = Console(stderr=as_json, highlight=False)
    meshes: dict[int, Mesh] = {}  # kept: every process group has threads
    references: dict[int, Told] = {}
    verdicts: list[Verdict] = []
    chosen = cases(small, size, layouts)
    if world.rank == 0:
        bug = f" with the bug {plant} planted" if plant else ""
        console.print(
            f"Verifying {len(chosen)} layouts of {size} ranks{bug}: three steps of a {small.model.num_hidden_layers}"
            f"-layer, {small.model.num_experts}-expert model against one process, tolerance {TOLERANCE:g}."
        )
    for case in chosen:
        started = time.perf_counter()
        if case.ep_size not in meshes:
            meshes[case.ep_size] = _mesh(world, case)
        found = run_trial(case.applied(small), meshes[case.ep_size], size * case.accumulation, plant=plant)
        if world.rank == 0:
            if case.accumulation not in references:
                single = Mesh.single(world.device)
                references[case.accumulation] = run_trial(small, single, size * case.accumulation)
            worst = deviations(found, references[case.accumulation])
            verdicts.append(Verdict(case.name, worst, time.perf_counter() - started))
            if not as_json and console.is_terminal:
                console.print(f"[dim]{len(verdicts)}/{len(chosen)} {case.name}[/dim]", end="\r")
    passed = [all(verdict.passed for verdict in verdicts)]
    if dist.is_initialized():
        dist.broadcast_object_list(passed, src=0)
    if world.rank == 0:
        print_verdicts(verdicts, console, as_json)
    return passed[0]


def _mesh(world: Mesh, case: Case) -> Mesh:
    if not dist.is_initialized():
        return world
    layout = Layout(world.layout.world_size, 1, case.ep_size)
    return Mesh.create(layout, world.device)


def print_verdicts(verdicts: list[Verdict], console: Console, as_json: bool) -> None:
    """A table for people on the console, or one JSON object on standard output."""
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if as_json:
        rows = [{"layout": v.name, "passed": v.passed, **v.worst} for v in verdicts]
        json.dump({"tolerance": TOLERANCE, "passed": not failed, "layouts": rows}, sys.stdout, indent=1)
        print(flush=True)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layout", header_style="dim")
    for column in COLUMNS:
        table.add_column(column, justify="right", header_style="dim")
    table.add_column("", header_style="dim")
    for verdict in verdicts:
        cells = [f"{verdict.worst[column]:.1e}" if verdict.worst[column] else "0" for column in COLUMNS]
        table.add_row(verdict.name, *cells, "pass" if verdict.passed else "[bold red]FAIL[/bold red]")
    console.print(table)
    if failed:
        console.print(f"[bold red]{len(failed)} of {len(verdicts)} layouts differ from one process[/bold red]")
    else:
        console.print(f"[bold]All {len(verdicts)} layouts compute what one process computes.[/bold]")
