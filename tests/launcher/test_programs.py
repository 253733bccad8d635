"""The other tests' own tool: what a program leaves behind is seen, and ended."""

from __future__ import annotations

import sys

import pytest
from programs import Program

ORPHAN = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True, stdout=-3, stderr=-3)"


def test_a_process_in_a_session_of_its_own_is_left_behind() -> None:
    """As torchrun's ranks are. Seen to fail with sessions compared and nothing else."""
    program = Program(sys.executable, "-c", ORPHAN)
    assert program.end() == 0
    (left,) = program.processes()
    with pytest.raises(AssertionError, match=rf"left behind: \[{left}\]"):
        program.gone_within(0.1)
    program.stop()
    assert program.processes() == []
