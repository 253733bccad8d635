"""Which cases `moe-dist verify` tries: `all`, `quick`, or by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from moe_dist.verify.design import Design, Designer
from moe_dist.verify.layouts import Case
from moe_dist.verify.life import Life, lives
from moe_dist.verify.scenarios import Scenario, Smallness
from moe_dist.verify.verdicts import refusals

GROUPS = ("all", "quick", "life", "none")


@dataclass
class Chosen:
    """`coverage`: what they cover, in lines for people."""

    cases: list[Scenario | Life] = field(default_factory=list)
    coverage: list[str] = field(default_factory=list)


def choose(small: Smallness, which: str, seed: int = 0) -> Chosen:
    """`quick`: every value of every feature and of every axis of a layout once. `all`: every pair of them. Both with
    the run file's own features in a few layouts, and with lives of runs. `life`: these alone; `none`: nothing.
    Otherwise a comma-separated list of names. Raises ConfigError for a name that is not feasible, with the reason.
    """
    if which == "none":
        return Chosen()
    if which not in GROUPS:
        named = [named_case(name) for name in which.split(",")]
        for case in named:
            case.check(small)
        return Chosen(named)
    chosen = Chosen()
    if which != "life":
        designer = Designer(small, seed)
        design = designer.pairs() if which == "all" else designer.singles()
        own = covering([layout for layout in designer.layouts if small.refusal(Scenario(layout)) is None], which)
        if small.world_size == 1:  # one device, a GPU perhaps: in what it will be used for, too
            own += [replace(layout, dtype=dtype) for layout in own for dtype in ("float32", "bf16")]
        chosen.cases += [Scenario(layout) for layout in own]
        chosen.cases += design.scenarios
        chosen.coverage += _coverage_lines(design, which, len(own))
    chosen.cases += lives(small, which, seed)
    return chosen


def named_case(name: str) -> Scenario | Life:
    return Life.named(name) if ":" in name else Scenario.named(name)


def _coverage_lines(design: Design, which: str, num_own: int) -> list[str]:
    kind = "pairs (and triples) of values" if which == "all" else "values"
    line = (
        f"{design.num_covered} of {design.num_items} {kind} of features and layouts in {len(design.scenarios)} cases, "
        f"the run file's own in {num_own} more"
    )
    if not design.refused:
        return [line]
    return [f"{line}; the rest is refused:", *refusals(design.refused)]


def covering(layouts: list[Case], which: str) -> list[Case]:
    """Few layouts for the run file's own features: always the next one that shows most that is new."""
    wanted = set().union(*(_shown(layout, which) for layout in layouts))
    left, chosen = list(layouts), []
    while wanted:
        best = max(left, key=lambda layout: len(_shown(layout, which) & wanted))
        wanted -= _shown(best, which)
        chosen.append(best)
    return sorted(chosen, key=left.index)


def _shown(layout: Case, which: str) -> set[tuple[str, ...]]:
    axes = layout.axes
    few: set[tuple[str, ...]] = {
        ("sharding", axes["sharding"]),
        ("ep", axes["expert parallelism"]),
        ("pp", str(layout.pp_size)),
    }
    if which == "quick":
        return few
    others = {(axis, axes[axis]) for axis in ("pipeline", "recomputation", "accumulation")}
    return few | others | {("ep", axes["expert parallelism"], "sharding", axes["sharding"])}
