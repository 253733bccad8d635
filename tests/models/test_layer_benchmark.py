"""The benchmark of one layer runs, checks its contenders against each other, and writes its figures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench" / "moe_layer.py"


@pytest.mark.slow
def test_one_size(tmp_path: Path) -> None:
    """How fast ours is depends on the machine and is not judged here.

    Seen to fail with the peers' gate left at weights of its own: they compute something else.
    """
    pytest.importorskip("transformers")
    command = [sys.executable, str(TOOL), "--quick", "--rounds", "1", "--only", "16x512->1024 top-2 fp32  512"]
    subprocess.run([*command, "--json", str(tmp_path / "figures.json")], check=True, timeout=240)
    found = json.loads((tmp_path / "figures.json").read_text())
    (cell,) = found["cells"]
    assert set(cell["seconds"]) == {"ours", "hf_eager", "hf_grouped_mm", "our_loop", "limit"}
    assert all(0 < seconds < math.inf for seconds in cell["seconds"].values())
    assert cell["ratios"]["limit"] == pytest.approx(cell["seconds"]["limit"] / cell["seconds"]["ours"])
    assert found["worst_ratio_to_best_peer"] == cell["ratio_to_best_peer"]
