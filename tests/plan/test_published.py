"""The tables of docs/planning.md are what the tool prints, and what they promise holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench.plan import RUNS, Verdict, flops_table, published_table, verdict

pytestmark = pytest.mark.slow
PAGE = (Path(__file__).parent.parent.parent / "docs" / "planning.md").read_text()


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    return [verdict(run) for run in RUNS]


def test_the_tables_in_the_page_are_what_the_tool_prints(verdicts: list[Verdict]) -> None:
    assert flops_table() in PAGE
    assert published_table(verdicts) in PAGE


def test_published_layouts_are_legal_and_fit(verdicts: list[Verdict]) -> None:
    """All of them; where the page says that a rank is missed it is, and most rates are within 45 %."""
    assert len(verdicts) >= 8
    assert all(one.fits for one in verdicts)
    errors = sorted(abs(one.found.tokens_per_second / one.run.rate - 1) for one in verdicts)
    assert errors[7] < 0.45
    assert published_table(verdicts).count("**miss**") == sum(not one.in_top_quarter for one in verdicts) <= 2
