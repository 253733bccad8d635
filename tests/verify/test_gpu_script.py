"""`tools/bench/gpu.py` in small sizes on the CPU: every part runs, one that fails does not stop the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "bench" / "gpu.py"


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", "--small", *arguments]
    return subprocess.run(command, text=True, capture_output=True, timeout=850)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part(tmp_path: Path) -> None:
    """Seen to fail with another seed after the kill: the losses are not bitwise those of the undisturbed run."""
    done = run(tmp_path, "--slack", "10")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    parts = found["parts"]
    assert list(parts) == ["verify", "resume", "layer", "kernels", "float8", "graphs", "step", "experts", "profile"]
    assert [(row["ranks"], row["passed"] == row["of"] > 0) for row in parts["verify"]["rows"]] == [(1, True), (4, True)]
    assert parts["resume"]["rows"][0]["losses bitwise equal"] is True
    assert all(row["grouped_mm / ours"] > 0 for row in parts["layer"]["rows"])
    assert "take train.kernels=torch" in parts["kernels"]["rows"][0]["not measured"]
    experts, training = parts["float8"]["rows"]
    assert experts["by"] == "emulation"
    assert 0.01 < float(experts["difference"]) < 0.2
    assert 0 < float(training["difference"]) < 0.01
    assert "CUDA graphs are captured on a GPU" in parts["graphs"]["rows"][0]["not measured"]
    assert {row["what"] for row in parts["step"]["rows"]} >= {"training step", "forward and backward, transformers"}
    assert all(row["forward and backward, rows/s"] > 0 for row in parts["experts"]["rows"])
    assert (tmp_path / "profile" / parts["profile"]["rows"][0]["page"]).stat().st_size > 10_000
    page = (tmp_path / "gpu.md").read_text()
    assert [line.split(" (")[0] for line in page.splitlines() if line.startswith("## ")] == [f"## {p}" for p in parts]


@pytest.mark.slow
def test_kernels_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU will measure, as far as a CPU can run it."""
    pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]'")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = run(tmp_path, "--only", "kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["parts"]["kernels"]["rows"]
    assert [row["what"] for row in rows] == ["to experts", "and back", "gated unit"]
    assert all(row["triton ms"] > 0 and float(row["difference"]) < 2e-2 for row in rows)


@pytest.mark.slow
def test_a_part_that_runs_out_of_time(tmp_path: Path) -> None:
    done = run(tmp_path, "--slack", "0.0001", "--only", "experts,layer")
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert done.returncode == 1
    assert all(part["error"].startswith("out of time") for part in found.values())
    assert "Failed: out of time" in (tmp_path / "gpu.md").read_text()
