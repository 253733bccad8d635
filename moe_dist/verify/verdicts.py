"""What came out of a proof: a line for each case as it ends, a summary, JSON. Imports no torch."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from moe_dist.parallel.proven import Proof


@dataclass(frozen=True)
class Verdict:
    """One case: largest relative differences of any rank from one process, by what was compared, and the ranks that
    differ too much. `error`: what was raised instead. `smallest`: the name of the simplest case that still fails.
    """

    name: str
    precision: str
    worst: dict[str, float]
    failed_on: list[int]
    seconds: float
    tolerances: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    smallest: str | None = None

    @property
    def passed(self) -> bool:
        return not self.failed_on and self.error is None

    @property
    def furthest(self) -> tuple[str, float]:
        """What is closest to its tolerance or furthest beyond it, and the difference."""

        def share(item: tuple[str, float]) -> float:
            name, value = item
            return value / self.tolerances[name] if self.tolerances.get(name) else value * math.inf if value else 0.0

        judged = [item for item in self.worst.items() if item[0] in self.tolerances]
        return max(judged, key=share, default=("", 0.0))


@dataclass
class Report:
    """The verdicts so far, what the design covers, and where they are kept for a start after a crash."""

    command: str
    """That repeats one case, up to its name."""
    plant: str | None = None
    as_json: bool = False
    speaks: bool = True
    file: Path | None = None
    coverage: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    proof: Proof | None = None
    """What it all came to, with versions."""

    def __post_init__(self) -> None:
        self.console = Console(stderr=self.as_json, highlight=False, soft_wrap=True)

    def silence(self) -> None:
        """For all ranks but one: they keep no file and print nothing."""
        self.speaks = False
        self.console.quiet = True

    @property
    def failed(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if not verdict.passed]

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def begin(self, name: str) -> None:
        """Noted, so that a start after a crash knows in what."""
        if self.file is not None and self.speaks:
            with self.file.open("a") as file:
                file.write(json.dumps({"begun": name}) + "\n")

    def add(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        if self.file is not None and self.speaks:
            with self.file.open("a") as file:
                file.write(json.dumps(asdict(verdict)) + "\n")
        if not self.as_json:
            self._print(verdict)

    def _print(self, verdict: Verdict) -> None:
        what, value = verdict.furthest
        said = f"{value:7.1e} {what:<10}" if value else f"{'0':>7} {'':<10}"
        if verdict.error is not None:
            said = f"{'error':<18}"
        word = "pass" if verdict.passed else "[bold red]FAIL[/bold red]"
        self.console.print(f"{word}  {verdict.precision:<8}  {said}  {verdict.seconds:5.1f}s  {escape(verdict.name)}")
        if verdict.passed:
            return
        if verdict.error is not None:
            self.console.print(f"      {verdict.error}", markup=False)
        else:
            self.console.print(f"      differs on ranks {', '.join(map(str, verdict.failed_on))}", markup=False)
        self.console.print(f"      alone: {self.command} --layouts '{verdict.name}'", markup=False)

    def shrunk(self, name: str, smallest: str) -> None:
        """The simplest case that still fails, of one that has failed."""
        verdict = next(verdict for verdict in self.verdicts if verdict.name == name)
        self.verdicts[self.verdicts.index(verdict)] = replace(verdict, smallest=smallest)
        if not self.as_json:
            self.console.print(f"      smallest: {self.command} --layouts '{smallest}'", markup=False)

    def end(self) -> bool:
        """The summary; returns whether every case passed."""
        passed = not self.failed
        if not self.speaks:
            return passed
        if self.as_json:
            from moe_dist.monitor.sinks.jsonl import json_safe  # numpy, where it is needed

            rows = [
                {
                    "layout": verdict.name,
                    "passed": verdict.passed,
                    "precision": verdict.precision,
                    "failed_on": verdict.failed_on,
                    "seconds": round(verdict.seconds, 3),
                    "error": verdict.error,
                    "smallest": verdict.smallest,
                    **verdict.worst,
                }
                for verdict in self.verdicts
            ]
            report: dict[str, Any] = {"plant": self.plant, "passed": passed, "coverage": self.coverage, "layouts": rows}
            report["versions"] = self.proof and self.proof.versions
            json.dump(json_safe(report), sys.stdout, indent=1, allow_nan=False)
            print(flush=True)
            return passed
        for line in self.coverage:
            self.say(line)
        if self.proof is not None:
            self.say(self.proof.sentence)
        count = len(self.verdicts)
        if not passed:
            self.console.print(f"[bold red]{len(self.failed)} of {count} cases differ from one process[/bold red]")
        elif self.plant:
            self.console.print(f"[bold red]The bug {self.plant} was not seen: {count} cases pass with it[/bold red]")
        else:
            self.console.print(f"[bold]All {count} cases compute what one process computes.[/bold]")
        return passed

    def take_earlier(self) -> set[str]:
        """Read the verdicts of an earlier start, which ended in the middle of a case; returns the names of all."""
        if self.file is None or not self.file.exists():
            return set()
        begun: str | None = None
        for line in self.file.read_text().splitlines():
            row = json.loads(line)
            if "begun" in row:
                begun = row["begun"]
            else:
                self.verdicts.append(Verdict(**row))
                begun = None
        if begun is not None:
            text = "the ranks ended in it, or did not answer any more; the lines above say how"
            self.add(Verdict(begun, "", {}, [], 0.0, error=text))
        return {verdict.name for verdict in self.verdicts}


def refusals(refused: Counter[str]) -> list[str]:
    """Why pairs are not covered, most first."""
    return [f"  {number:4} {reason}" for reason, number in refused.most_common()]
