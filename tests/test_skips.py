"""A way to start that is not tested is a failure in the gate, and a skip elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.fixture
def cluster():
    pytest.skip("no Slurm")

@pytest.mark.launch
@pytest.mark.skipif(True, reason="no Ray")
def test_by_mark(): pass

@pytest.mark.launch
def test_by_fixture(cluster): pass

@pytest.mark.launch
def test_by_call(): pytest.skip("no kubectl")

@pytest.mark.launch
def test_of_a_kernel(): pytest.skip("`ip netns add x` is not possible here: Operation not permitted")

@pytest.mark.launch
@pytest.mark.xfail
def test_of_a_known_bug(): assert False

def test_of_something_else(): pytest.skip("no browser")
"""


def test_what_is_not_installed_fails_in_the_gate(tmp_path: Path) -> None:
    """Seen to fail without the hook: 5 skipped."""
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = launch: x\n")
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "MOE_DIST_NO_LAUNCH_SKIPS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1].startswith("1 failed, 2 skipped, 1 xfailed, 2 errors in ")
