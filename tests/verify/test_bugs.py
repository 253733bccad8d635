"""Every known bug is seen by a case of `quick` or `all` as they are: nothing is switched on for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import GROUP_TIMEOUT, _sets, run_ranks
from tiny import mesh_of
from torch.distributed import distributed_c10d

from moe_dist.config import load_config
from moe_dist.verify.bugs import _OF_FEATURES, _OF_LAYOUTS, _OF_LIVES, BUGS
from moe_dist.verify.cases import choose, named_case
from moe_dist.verify.features import LOW_PRECISION, ONCE
from moe_dist.verify.injected_bugs import PLANTS, REACHED
from moe_dist.verify.life import Life
from moe_dist.verify.run import Verifier
from moe_dist.verify.scenarios import Scenario, Smallness
from moe_dist.verify.verdicts import Verdict

TRIES = 3
FAST = {
    "norm_of_the_last_stage",
    "positions_of_the_first_micro_batch",
    "documents_kept_apart_in_a_pipeline",
    "tied_weight_counted_twice",
    "capacity_counts_padding",
    "z_loss_times_ep",
}
"""A sample that is planted in every run of the fast tests."""
BREAKS = {"weights_left_whole_by_an_evaluation": "the local_tensor argument only accepts torch.Tensor but got"}
"""What is said where a bug raises an error on all ranks."""
plants = [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.proof if number % 8 else pytest.mark.slow])
    for number, name in enumerate(BUGS)
]


@cache
def small() -> Smallness:
    file = Path(__file__).parents[2] / "configs" / "demo.yaml"
    return Smallness(load_config(file, notice=lambda text: None), 4)


@cache
def designed() -> list[Scenario | Life]:
    """All cases that are proven without being asked for."""
    return list({case.name: case for which in ("quick", "all") for case in choose(small(), which).cases}.values())


def acts_in(plant: str, case: Scenario | Life) -> bool:
    """Features of the run file itself are the plain ones, and have no words."""
    if isinstance(case, Life):
        return BUGS[plant].acts_in(case.layouts, case.features, case.events)
    return BUGS[plant].acts_in([case.layout], case.features or frozenset())


def cost(case: Scenario | Life) -> tuple[int, int]:
    """How coarse the tolerances are: in float64 a bug of any size is seen. Then the work, in powers of two."""
    if isinstance(case, Life):
        return 3, sum(map(len, case.scripts))
    features = case.features or frozenset()
    coarse = 2 if features & (LOW_PRECISION | ONCE) else int(case.precision != "float64")
    micro_batches = 4 * case.layout.accumulation // case.layout.pp_size
    slow = 1 + bool(features & {"own_experts", "noisy_experts"}) + (case.layout.recompute == "full")
    return coarse, (case.num_layers * micro_batches * slow).bit_length()


@cache
def by_cost() -> list[Scenario | Life]:
    """Of cases that cost as much, those first in which most bugs act: what one process computes there is kept."""
    shared = {case.name: sum(acts_in(plant, case) for plant in BUGS) for case in designed()}
    return sorted(designed(), key=lambda case: (cost(case), -shared[case.name]))


def candidates(plant: str) -> list[str]:
    """Names of the cases in which the bug acts, cheapest first."""
    return [case.name for case in by_cost() if acts_in(plant, case)]


@cache
def verifier() -> Verifier:
    return Verifier(mesh_of(1))


@contextmanager
def patience() -> Iterator[None]:
    """While one rank lives a life alone, the others wait for it."""
    group = dist.group.WORLD
    assert group is not None
    distributed_c10d._set_pg_timeout(timedelta(seconds=200), group)
    try:
        yield
    finally:
        distributed_c10d._set_pg_timeout(timedelta(seconds=GROUP_TIMEOUT), group)


def planted_in(names: list[str], plant: str) -> tuple[list[Verdict], int]:
    """Verdicts up to the first that is red, and how often this rank has met the bug."""
    verdicts: list[Verdict] = []
    REACHED.clear()
    with patience():
        for name in names:
            verdicts.append(verifier().verdict(named_case(name), small(), plant))
            if not verdicts[-1].passed:
                break
    return verdicts, REACHED[plant]


def forget() -> None:
    verifier().alone.forget()


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """On disk, of the last life."""
    yield
    if 4 in _sets:
        run_ranks(forget, 4)


def test_every_bug_can_be_planted() -> None:
    assert set(PLANTS) == set(BUGS)
    assert len(BUGS) >= 65


def test_the_page_counts_them() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "proof.md").read_text().split())
    assert f"{len(_OF_LAYOUTS)} in what ranks do together" in page
    assert f"{len(_OF_FEATURES)} in one feature" in page
    assert f"{len(_OF_LIVES)} in what comes after" in page


def test_every_bug_has_a_case_that_shows_it() -> None:
    """However small what it does is: in float64, or in DeepSpeed's float32, unless low precision is what it needs."""
    for plant, bug in BUGS.items():
        shown = [named_case(name) for name in candidates(plant)]
        assert any(not (case.features or frozenset()) & LOW_PRECISION - set(bug.words) for case in shown), plant


@pytest.mark.dist
@pytest.mark.parametrize("plant", plants)
def test_a_planted_bug_is_seen(plant: str) -> None:
    """Red in one of the cheapest cases in which it acts, by far more than the tolerance."""
    names = candidates(plant)[:TRIES]
    assert names, f"no case of quick or all has what {plant} needs"
    results = run_ranks(planted_in, 4, names, plant, timeout=200)
    assert sum(reached for _, reached in results), f"{plant}: nothing has called what was put in place"
    verdict = results[0][0][-1]
    assert not verdict.passed, f"{plant} was not seen in {', '.join(names)}: {[v.worst for v in results[0][0]]}"
    if plant in BREAKS:
        assert verdict.error is not None
        assert BREAKS[plant] in verdict.error
    else:
        assert verdict.error is None
        assert verdict.furthest[1] > 1e-5, verdict
