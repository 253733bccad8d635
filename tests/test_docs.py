"""Pages stay true: pointers into the code, links between pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_architecture_points_at_the_right_lines() -> None:
    command = [sys.executable, "tools/architecture_lines.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"run: python tools/architecture_lines.py\n{done.stderr}"


def test_tables_of_metrics_are_those_of_the_code() -> None:
    command = [sys.executable, "tools/metrics_tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"run: python tools/metrics_tables.py\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_files_that_exist(page: Path) -> None:
    for config in re.findall(r"\bconfigs/[\w.]+\.yaml", page.read_text()):
        assert (ROOT / config).is_file(), f"{page.name}: {config}"


def test_the_mesh_in_the_page_is_what_check_prints() -> None:
    """Whole, as a terminal of 118 columns shows it."""
    page = (ROOT / "docs" / "parallelism.md").read_text()
    command, wanted = re.findall(r"^```\n\$ moe-dist (check .*)\n((?:.*\n)*?)```$", page, re.MULTILINE)[0]
    run = [sys.executable, "-m", "launcher", *command.split()]
    environment = {**os.environ, "COLUMNS": "118"}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert [line.rstrip() for line in done.stdout.rstrip().splitlines()] == wanted.rstrip().splitlines()


@pytest.mark.slow
def test_the_figures_in_the_page_are_what_the_tool_draws() -> None:
    """With the PyTorch that is installed: its schedules may change."""
    page = (ROOT / "docs" / "parallelism.md").read_text()
    command = [sys.executable, "tools/parallelism_figures.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True)
    schedules, memory = done.stdout.rstrip().rsplit("\n\n", 1)
    assert [figure for figure in (schedules, memory) if f"```text\n{figure}\n```" not in page] == []
