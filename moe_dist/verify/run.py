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
from moe_dist.verify.layouts import BUGS, Case, cases, shrunken
from moe_dist.verify.trial import BF16_TOLERANCE, COMPARED, TOLERANCE, Told, deviations, passes, run_trial


@dataclass(frozen=True)
class Verdict:
    """One layout: largest relative differences from one process, by what was compared."""

    name: str
    worst: dict[str, float]
    passed: bool
    seconds: float


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

        Rank 0 prints a table, or JSON. `plant`: a known bug of `BUGS` is in the system while layouts run (never in the
        reference). Returns whether every layout passed, on every rank. Raises ConfigError as `cases` does.
        """
        size = self.world.layout.world_size
        deep = shrunken(config, size, plant)
        console = Console(stderr=as_json, highlight=False)
        if not console.is_terminal:  # nobody's window to fit into: a layout stays on its line
            console.width = max(console.width, 120)
        verdicts: list[Verdict] = []
        chosen = cases(deep, size, layouts)
        if self.world.rank == 0:
            options = ", ".join(f"{key}={value}" for key, value in BUGS.get(plant or "", {}).items())
            bug = f" with the bug {plant} planted{f' ({options})' if options else ''}" if plant else ""
            console.print(
                f"Verifying {len(chosen)} layouts of {size} ranks{bug}: three steps of a small "
                f"{deep.model.num_experts}-expert model against one process, tolerance {TOLERANCE:g}{_bf16(chosen)}."
            )
        for case in chosen:
            started = time.perf_counter()
            small = shrunken(config, size, plant, case.applied(deep, size).parallel.num_stages)
            mesh = self._mesh(case)
            count = mesh.layout.dp_size * case.accumulation
            found = run_trial(case.applied(small, size), mesh, count, plant=plant)
            if self.world.rank == 0:
                worst = deviations(found, self._reference(small, count))
                passed = passes(worst, case.bf16)
                verdicts.append(Verdict(case.name, worst, passed, time.perf_counter() - started))
                if not as_json and console.is_terminal:
                    console.print(f"[dim]{len(verdicts)}/{len(chosen)} {case.name:<60}[/dim]", end="\r")
        all_passed = [all(verdict.passed for verdict in verdicts)]
        if dist.is_initialized():
            dist.broadcast_object_list(all_passed, src=0)
        if self.world.rank == 0:
            print_verdicts(verdicts, console, as_json)
        return all_passed[0]

    def _mesh(self, case: Case) -> Mesh:
        if not dist.is_initialized():
            return self.world
        key = (case.pp_size, case.ep_size, case.shard_size)
        if key not in self._meshes:  # kept: every process group has threads
            layout = Layout(self.world.layout.world_size, case.pp_size, case.ep_size)
            self._meshes[key] = Mesh.create(layout, self.world.device, case.shard_size)
        return self._meshes[key]

    def _reference(self, config: Config, count: int) -> Told:
        key = (config.model_dump_json(), count)
        if key not in self._references:
            # Ranks are held against one of their kind; a single process, on a GPU perhaps, against the CPU.
            device = self.world.device if self.world.layout.world_size > 1 else "cpu"
            self._references[key] = run_trial(config, Mesh.single(device), count)
        return self._references[key]


def _bf16(chosen: list[Case]) -> str:
    if not any(case.bf16 for case in chosen):
        return ""
    return f" (bf16: {', '.join(f'{name} {tolerance:g}' for name, tolerance in BF16_TOLERANCE.items())})"


def print_verdicts(verdicts: list[Verdict], console: Console, as_json: bool) -> None:
    """A table for people on the console, or one JSON object on standard output."""
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if as_json:
        rows = [{"layout": v.name, "passed": v.passed, "seconds": round(v.seconds, 3), **v.worst} for v in verdicts]
        json.dump({"tolerance": TOLERANCE, "passed": not failed, "layouts": rows}, sys.stdout, indent=1)
        print(flush=True)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layout", header_style="dim", overflow="fold")
    for column in COMPARED:
        table.add_column(column, justify="right", header_style="dim", no_wrap=True, min_width=len("gradients"))
    table.add_column("", header_style="dim", no_wrap=True, min_width=4)
    for verdict in verdicts:
        cells = [f"{verdict.worst[column]:.1e}" if verdict.worst[column] else "0" for column in COMPARED]
        table.add_row(verdict.name, *cells, "pass" if verdict.passed else "[bold red]FAIL[/bold red]")
    console.print(table)
    if failed:
        console.print(f"[bold red]{len(failed)} of {len(verdicts)} layouts differ from one process[/bold red]")
    else:
        console.print(f"[bold]All {len(verdicts)} layouts compute what one process computes.[/bold]")
