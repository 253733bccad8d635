"""25 of the kills of `tools/soak.py`; as many as anybody has time for are recorded in docs/reliability.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("launcher", "ranks", "kills"), [("local", 1, 8), ("torchrun", 2, 8), ("local", 2, 9)])
def test_killed_again_and_again_it_ends_where_it_would_have(launcher: str, ranks: int, kills: int) -> None:
    """Seen to fail with the data's position left out of `Persistence.restore`."""
    words = [sys.executable, "tools/soak.py", "--kills", str(kills), "--seed", "3", "--ranks", str(ranks)]
    words += ["--launcher", launcher, "--seconds", "150"]  # no kills after that: a busy machine does fewer
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all bitwise equal" in done.stdout
