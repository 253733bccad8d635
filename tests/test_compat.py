"""The tool that tries other versions: what it reads, and the table that it keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import compat

ROOT = Path(__file__).parents[1]
CELLS = ("2.12.1", "3.12.1", "5.24.0", "24 of 24 (quick)", "700 passed", "2026-11-29")


def test_a_row_takes_the_place_of_an_older_one() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    once = compat.with_row(page, CELLS)
    twice = compat.with_row(once, (*CELLS[:3], "FAILED: ep1-zero3 (quick)", *CELLS[4:]))
    assert f"| {' | '.join(CELLS)} |" in once
    assert "FAILED: ep1-zero3 (quick)" in twice
    assert twice.count("| 2.12") == once.count("| 2.12") == 1
    assert compat.with_row(twice, CELLS) == once
    assert [line for line in page.splitlines() if "| 2.12" not in line] == [
        line for line in once.splitlines() if "| 2.12" not in line
    ]


def test_rows_span_the_promised_range() -> None:
    """The ends of the range in pyproject.toml are rows, and the oldest `transformers` is one's."""
    project = (ROOT / "pyproject.toml").read_text()
    first, last = compat.ROWS[0].torch, compat.ROWS[-1].torch
    major, minor = last.split(".")
    assert f'"torch>={first},<{major}.{int(minor) + 1}"' in project
    assert f'"torch>={first},<{major}.{int(minor) + 1}"' in (ROOT / "k8s" / "Dockerfile").read_text()
    assert '"transformers>=5.0"' in project
    assert "transformers==5.0.*" in compat.ROWS[0].pins


def program(folder: Path, code: str) -> Path:
    """Stands for an environment's Python: ignores what it is asked, says what the test wants."""
    file = folder / "python"
    file.write_text(f"#!{sys.executable}\n{code}\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(
    ("said", "code", "verdict"),
    [
        ('{"layouts": [{"layout": "ep1-zero3", "passed": true}]}', 0, "1 of 1 (quick)"),
        ('{"layouts": [{"layout": "a", "passed": true}, {"layout": "b", "passed": false}]}', 1, "FAILED: b (quick)"),
        ("", 1, "FAILED: no case ran (quick)"),
        ("", 2, "verify ended with 2"),
    ],
)
def test_the_verdict_of_a_proof(tmp_path: Path, said: str, code: int, verdict: str) -> None:
    python = program(tmp_path, f"import sys; print({said!r}, end=''); sys.exit({code})")
    try:
        found = compat.proof(python, "quick", tmp_path / "log")
    except compat.Failed as error:
        found = str(error)
    assert found == verdict


@pytest.mark.parametrize(
    ("last", "verdict"),
    [
        ("812 passed, 3 skipped, 40 deselected in 61.20s (0:01:01)", "812 passed, 3 skipped"),
        ("2 failed, 810 passed in 61.20s", "FAILED: 2 failed, 810 passed"),
        ("no tests ran in 0.1s", "FAILED: no tests ran in 0.1s"),
    ],
)
def test_the_verdict_of_the_tests(tmp_path: Path, last: str, verdict: str) -> None:
    python = program(tmp_path, f"print('.....'); print({last!r})")
    try:
        found = compat.tests(python, tmp_path / "log")
    except compat.Failed as error:
        found = str(error)
    assert found == verdict
