"""Runs with copies of hot experts: checkpoints know nothing of them, and a resumed run has the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_moved_experts import go

from launcher.cli.layout_table import print_report
from moe_dist.config import load_mapping

pytestmark = pytest.mark.dist
COPIES = {"replicated_experts": 2, "placement_interval": 2}


def copied(folder: Path) -> dict[int, list[list[int]]]:
    """By step: of each layer the experts that had copies."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: [layer["copied_experts"] for layer in row["layers"]] for row in rows if row["kind"] == "train"}


def test_a_run_goes_on_with_the_same_copies_and_from_any_other_run(tmp_path: Path) -> None:
    """Seen to fail with no copies until the first decision after a start: those of step 4."""
    stayed = go(tmp_path / "stayed", 7, ep_size=4)
    whole = go(tmp_path / "whole", 5, ep_size=4, **COPIES)
    assert whole == pytest.approx(stayed[:5], rel=1e-9)
    parts = go(tmp_path / "parts", 3, ep_size=4, **COPIES) + go(tmp_path / "parts", 5, ep_size=4, **COPIES)
    assert parts == whole
    by_step = copied(tmp_path / "whole")
    assert copied(tmp_path / "parts") == by_step
    assert by_step[2] == [[], []]
    assert all(len(experts) == 2 for step in (3, 4, 5) for experts in by_step[step])

    without = go(tmp_path / "parts", 6, ep_size=4)
    elsewhere = go(tmp_path / "parts", 7, ep_size=2, zero_stage=3, **COPIES)
    assert [*without, *elsewhere] == pytest.approx(stayed[5:], rel=1e-9)


def test_check_says_what_copies_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """Two experts of 3 x 64 x 32 float32 numbers, half of them from the other rank, there and back: 49152 bytes."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1, "num_experts": 8}
    tree = {"model": sizes, "parallel": {"ep_size": 2, "replicated_experts": 2}}
    print_report(load_mapping(tree), 2)
    said = capsys.readouterr().out
    assert "the 2 hottest experts of each layer" in said
    assert "a rank sends 49.2 kB of weights and their gradients in a step, as much as 96 rows" in said
    print_report(load_mapping(tree | {"parallel": {"ep_size": 2}}), 2)
    assert "copies" not in capsys.readouterr().out
