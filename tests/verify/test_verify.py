"""`moe-dist verify`: green on every layout, red with any known bug planted."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny import mesh_of

from moe_dist.config_loading import ConfigError, load_config
from moe_dist.verify.layouts import cases, shrunken
from moe_dist.verify.plants import PLANTS

ROOT = Path(__file__).parents[2]
# Bugs of an option are seen only where the option is on.
NEEDS = {
    "global_load_is_local": ("balance.aux_loss_scope=global_batch",),
    "load_of_the_whole_batch_unknown": ("balance.aux_loss_scope=global_batch",),
    "capacity_of_the_whole_group": ("balance.capacity_factor=0.8",),
    "bias_from_counts_after_drop": ("balance.bias_update_rate=0.01",),
    "bias_from_local_counts": ("balance.bias_update_rate=0.01",),
}


def outcome(config: str, overrides: tuple[str, ...], layouts: str, plant: str | None = None) -> tuple[bool, Any]:
    """(passed, what rank 0 printed as JSON)."""
    from moe_dist.verify.run import verify

    settings = load_config(ROOT / "configs" / config, overrides, notice=lambda text: None)
    printed = io.StringIO()
    with redirect_stdout(printed):
        passed = verify(settings, mesh_of(1), layouts, plant, as_json=True)
    text = printed.getvalue()
    return passed, json.loads(text) if text else None


@pytest.mark.dist
@pytest.mark.parametrize("config", ["demo.yaml", pytest.param("mixtral_8x7b.yaml", marks=pytest.mark.slow)])
def test_a_covering_set_of_layouts_passes(config: str) -> None:
    """Every ep size with every zero_stage, accumulation and recomputation alternating."""
    results = run_ranks(outcome, 4, config, ("balance.bias_update_rate=0.01",), "quick")
    assert [passed for passed, _ in results] == [True] * 4
    assert len(results[0][1]["layouts"]) == 12
    assert results[1][1] is None


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_layout_passes() -> None:
    overrides = ("balance.bias_update_rate=0.01", "balance.router_z_loss_coef=0.001", "balance.aux_loss_scope=sequence")
    (passed, report), *_ = run_ranks(outcome, 4, "demo.yaml", overrides, "all", timeout=600)
    assert passed, report
    assert len(report["layouts"]) >= 40


@pytest.mark.dist
@pytest.mark.parametrize("plant", sorted(PLANTS))
def test_a_planted_bug_goes_red(plant: str) -> None:
    layouts = "ep2-zero0-acc2,ep4-zero0"
    for passed, report in run_ranks(outcome, 4, "demo.yaml", NEEDS.get(plant, ()), layouts, plant):
        assert not passed, report


def test_layouts_are_named_and_chosen() -> None:
    config = shrunken(load_config(ROOT / "configs" / "demo.yaml"), 4)
    every = cases(config, 4)
    assert len(every) == 48
    assert len({case.name for case in every}) == 48
    quick = cases(config, 4, "quick")
    assert {(case.ep_size, case.zero_stage) for case in quick} == {(e, z) for e in (1, 2, 4) for z in range(4)}
    assert {case.accumulation for case in quick} == {1, 2}
    assert {case.recompute for case in quick} == {"none", "full"}
    assert [case.name for case in cases(config, 4, "ep2-zero3-full,ep1-zero0")] == ["ep2-zero3-full", "ep1-zero0"]
    with pytest.raises(ConfigError, match="ep3-zero0: not feasible here; allowed: all, quick, ep1-zero0"):
        cases(config, 4, "ep3-zero0")


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_run_file_shrinks(file: Path) -> None:
    config = load_config(file, notice=lambda text: None)
    small = shrunken(config, 8)
    assert small.model.num_experts % 8 == 0
    assert small.model.norm_topk_prob == config.model.norm_topk_prob
    assert small.model.qk_norm == config.model.qk_norm
    assert (small.model.kv_heads == small.model.num_attention_heads) == (
        config.model.kv_heads == config.model.num_attention_heads
    )


@pytest.mark.dist
def test_the_command_says_what_differs(tmp_path: Path) -> None:
    """A table, one line of verdict, exit code 1; nothing else on standard error, nothing written."""
    command = [sys.executable, "-m", "launcher", "verify", str(ROOT / "configs" / "demo.yaml"), "-n", "2"]
    command += ["--layouts", "ep1-zero0,ep2-zero2", "--plant", "norm_without_experts"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert any(line.startswith("ep1-zero0") and line.endswith("FAIL") for line in lines)
    assert any(line.startswith("ep2-zero2") and line.endswith("pass") for line in lines)
    assert lines[-1] == "1 of 2 layouts differ from one process"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_bug_is_one_line() -> None:
    command = [sys.executable, "-m", "launcher", "verify", "configs/demo.yaml", "--plant", "gremlin"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "--plant gremlin: not a known bug; allowed: expert_gradient_times_ep, " in done.stderr
    assert len(done.stderr.splitlines()) == 1
