"""The tables of docs/planning.md are what the tool prints, and what they promise holds."""

from __future__ import annotations

from pathlib import Path

from tools.bench.plan import RUNS, flops_table, published_table, verdict

PAGE = (Path(__file__).parent.parent.parent / "docs" / "planning.md").read_text()


def test_the_tables_in_the_page_are_what_the_tool_prints() -> None:
    assert flops_table() in PAGE
    assert published_table() in PAGE


def test_published_layouts_are_legal_and_fit() -> None:
    """All of them; where the page says that a rank is missed it is, and most rates are within 40 %."""
    seen = [verdict(run) for run in RUNS]
    assert len(seen) >= 8
    assert all(one.fits for one in seen)
    errors = sorted(abs(one.found.tokens_per_second / one.run.rate - 1) for one in seen)
    assert errors[7] < 0.4
    assert PAGE.count("**miss**") == sum(not one.in_top_quarter for one in seen)
