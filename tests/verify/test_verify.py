"""`moe-dist verify`: green on every layout, red with any known bug planted."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import run_ranks
from tiny import mesh_of

from moe_dist import config_checks
from moe_dist.config import Config
from moe_dist.config_loading import ConfigError, load_config
from moe_dist.models.experts import Expert
from moe_dist.models.recompute import is_recomputing
from moe_dist.verify.layouts import BUGS, RECOMPUTE, SCHEDULES, Case, cases, shrunken
from moe_dist.verify.run import Telling, Verdict, Verifier
from moe_dist.verify.trial import TOLERANCE

ROOT = Path(__file__).parents[2]
EVERY_OPTION = ("balance.bias_update_rate=0.01", "balance.router_z_loss_coef=0.001", "balance.aux_loss_scope=sequence")
# The layouts in which a bug must be seen, where they are not those of experts over several replicas.
PIPELINE, BOTH_STAGES = "pp2-1f1b-ep2-zero0-acc2", "ep2-zero1-acc2-deepspeed,ep2-zero2-acc2-deepspeed"
SEEN_IN = {
    "gradients_scaled_by_the_schedule": PIPELINE,
    "auxiliary_loss_scaled_by_the_schedule": PIPELINE,
    "gradients_of_a_stage_reduced_twice": PIPELINE,
    "norm_of_the_last_stage": PIPELINE,
    "loss_of_one_stage": PIPELINE,
    "load_counted_by_a_pass_for_shapes": PIPELINE,
    "global_load_is_local": "ep2-zero0",  # with several micro-batches the load is known from a pass before
    "norm_of_own_experts": "ep2-zero0-acc2,ep2-zero2,ep4-zero3",
    "fsdp_averages": "ep2-zero1-acc2,ep4-zero3",
    "fsdp_averages_experts": "ep2-zero1-acc2,ep2-zero3",
    **{name: BOTH_STAGES for name in BUGS if name.startswith("deepspeed")},
}


def run_file(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / name, overrides, notice=lambda text: None)


def outcomes(config: Config, asked: list[tuple[str, str | None]]) -> list[tuple[bool, Any]]:
    """(passed, what rank 0 printed as JSON) for every (layouts, plant): one set of process groups serves all."""
    verifier, told = Verifier(mesh_of(1)), []
    for layouts, plant in asked:
        printed = io.StringIO()
        with redirect_stdout(printed):
            passed = verifier.verify(config, layouts, plant, as_json=True)
        told.append((passed, json.loads(printed.getvalue() or "null")))
    return told


def failed(report: Any) -> list[str]:
    return [row["layout"] for row in report["layouts"] if not row["passed"]]


@pytest.mark.dist
@pytest.mark.parametrize("config", ["demo.yaml", pytest.param("mixtral_8x7b.yaml", marks=pytest.mark.slow)])
def test_a_covering_set_of_layouts_passes(config: str) -> None:
    """Every schedule at every pipeline size, every ep size with every zero_stage, both engines."""
    settings = run_file(config, "balance.bias_update_rate=0.01")
    results = run_ranks(outcomes, 4, settings, [("quick", None)], timeout=280)
    assert failed(results[0][0][1]) == []
    assert [passed for ((passed, _),) in results] == [True] * 4
    assert 16 <= len(results[0][0][1]["layouts"]) <= 20
    assert results[1][0][1] is None  # only rank 0 prints


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_layout_passes() -> None:
    results = run_ranks(outcomes, 4, run_file("demo.yaml", *EVERY_OPTION), [("all", None)], timeout=1400)
    ((passed, report),) = results[0]
    assert failed(report) == []
    assert passed
    assert len(report["layouts"]) >= 120


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_ranks() -> None:
    """pp 2 x edp 2 x ep 2, where every kind of group has two ranks; and every schedule on pp 4 x ep 2."""
    layouts = "pp2-1f1b-ep2-zero0-acc2,pp2-dualpipe_v-ep2-zero1-acc4-full,pp2-interleaved_1f1b-ep2-zero3-acc2"
    for schedule in ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "dualpipe_v"):
        layouts += f",pp4-{schedule}-ep2-zero0-acc8"
    settings = run_file("demo.yaml", *EVERY_OPTION)
    for ((passed, report),) in run_ranks(outcomes, 8, settings, [(layouts, None)], timeout=500):
        assert passed, report


def test_one_process_in_bfloat16() -> None:
    """With a tolerance of its own, and red with a bug too. Both sides are on the CPU here; `moe-dist verify -n 1` on a
    machine with CUDA holds the GPU against the CPU.
    """
    layouts = "ep1-zero0-bf16,ep1-zero0-acc2-full-bf16"
    (passed, report), (_, wrong) = outcomes(run_file("demo.yaml"), [(layouts, None), (layouts, "router_cut_from_loss")])
    assert passed, report
    assert [row["gradients"] > 1e-3 for row in report["layouts"]] == [True, True]  # it was bfloat16
    assert failed(wrong) == layouts.split(",")
    assert {case.bf16 for case in cases(shrunken(run_file("demo.yaml"), 1), 1)} == {False, True}


@cache
def reports_of_all_plants() -> dict[str, Any]:
    asked: list[tuple[str, str | None]] = [(SEEN_IN.get(plant, "ep2-zero0-acc2"), plant) for plant in BUGS]
    results = run_ranks(outcomes, 4, run_file("demo.yaml"), asked, timeout=280)
    assert not any(passed for told in results for passed, _ in told)
    return {plant: report for (_, plant), (_, report) in zip(asked, results[0], strict=True) if plant}


@pytest.mark.dist
@pytest.mark.parametrize(
    "plant",  # a third at once, the rest with the slow ones
    [pytest.param(bug, marks=[pytest.mark.slow] if number % 3 else []) for number, bug in enumerate(sorted(BUGS))],
)
def test_a_planted_bug_goes_red(plant: str) -> None:
    """In every layout it is looked for, by ten times the tolerance; without it, they are green in `all`."""
    report = reports_of_all_plants()[plant]
    for row in report["layouts"]:
        differences = [value for value in row.values() if isinstance(value, float) and value is not row["seconds"]]
        assert not row["passed"]
        assert max(differences) > 10 * TOLERANCE, row


@pytest.mark.dist
def test_every_replica_is_looked_at() -> None:
    """Weights of the last rank lag behind: the losses and what rank 0 holds are right. Its `ep` peer sees them too."""
    (row,) = reports_of_all_plants()["replica_misses_the_last_update"]["layouts"]
    assert row["failed_on"] == [2, 3]
    assert max(row[column] for column in ("losses", "gradients", "norms")) < TOLERANCE < row["weights"]


def test_a_bug_that_is_not_seen_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """One process has no expert parallelism to go wrong: green with the bug, so exit code 5 and no praise."""
    from launcher.environment import detect
    from launcher.worker import EXIT_UNSEEN, Proof, verify

    assert (
        verify(run_file("demo.yaml", "parallel.ep_size=1"), detect(), Proof("ep1-zero0", "expert_gradient_times_ep"))
        == EXIT_UNSEEN
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "The bug expert_gradient_times_ep was not seen: 1 layouts pass with it"


@pytest.mark.parametrize("switch", ["use_auxiliary_loss=false", "router_aux_loss_coef=0"])
def test_what_a_bug_needs_is_switched_on(switch: str) -> None:
    """Without the loss, its bugs would plant nothing."""
    settings = run_file("demo.yaml", f"balance.{switch}")
    for plant in [name for name in BUGS if "auxiliary" in name or name.endswith(("_is_local", "_unknown"))]:
        assert shrunken(settings, 4, plant).balance.aux_loss_coef > 0
    assert outcomes(settings, [("ep1-zero0", "auxiliary_loss_cut")])[0][0] is False


class Brittle(Expert):
    """Breaks when its forward pass is repeated."""

    def forward(self, x_RD: torch.Tensor) -> torch.Tensor:
        if is_recomputing():
            raise ArithmeticError("it is broken")
        return 2 * x_RD


def test_a_layout_that_breaks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """After what was found before it."""
    settings = run_file("demo.yaml", "model.expert=test_verify:Brittle")
    for as_json in (False, True):
        with pytest.raises(RuntimeError, match="layout ep1-zero0-full: ArithmeticError: it is broken"):
            Verifier(mesh_of(1)).verify(settings, "ep1-zero0,ep1-zero0-full,ep1-zero0-acc2", as_json=as_json)
        said = capsys.readouterr().out
        if as_json:
            report = json.loads(said)
            assert (report["passed"], report["broken"]) == (False, "ep1-zero0-full")
            assert [row["layout"] for row in report["layouts"]] == ["ep1-zero0"]
        else:
            assert "pass" in next(line for line in said.splitlines() if line.startswith("ep1-zero0 "))
            assert said.splitlines()[-1] == "ep1-zero0-full ended with an error; 1 layouts were done"


def test_infinity_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Seen to fail with a bare Infinity, which no parser but Python's reads."""
    told = Telling(True, None, as_json=True)
    told.add(Verdict("ep1-zero0", {"gradients": float("inf")}, [0], 1.0))
    told.end()
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["layouts"][0]["gradients"] == "Infinity"


def without_the_refusal(layouts: str) -> tuple[bool, Any]:
    with patch.object(config_checks, "check_pipeline", lambda config: None):
        return outcomes(run_file("demo.yaml"), [(layouts, None)])[0]


@pytest.mark.dist
@pytest.mark.parametrize("schedule", ["zero_bubble", "dualpipe_v"])
def test_what_is_refused_would_be_seen(schedule: str) -> None:
    """Freed parameters under a split backward train silently wrong in PyTorch: refused, and red were it not."""
    layout = f"pp2-{schedule}-ep1-zero3-acc4"
    with pytest.raises(ConfigError, match=f"{layout}: parallel.zero_stage=3: parallel.schedule={schedule} needs whole"):
        cases(shrunken(run_file("demo.yaml"), 4), 4, layout)
    for passed, report in run_ranks(without_the_refusal, 4, layout):
        assert not passed, report


def test_all_is_every_placement() -> None:
    config = shrunken(run_file("demo.yaml"), 4)
    every = cases(config, 4)
    assert len(every) >= 120
    assert len({case.name for case in every}) == len(every)
    assert [Case.named(case.name) for case in every] == every
    placements = {(c.pp_size, c.schedule, c.ep_size, c.zero_stage) for c in every if c.pp_size > 1}
    split = ("zero_bubble", "dualpipe_v")
    assert placements == {
        (pp_size, schedule, ep_size, stage)
        for pp_size, ep_size in ((2, 1), (2, 2), (4, 1))
        for schedule in SCHEDULES
        for stage in ((0, 1) if schedule in split else (0, 1, 3))
    }
    plain = {(c.ep_size, c.zero_stage) for c in every if c.pp_size == 1 and c.engine == "torch" and not c.shard_size}
    assert plain == {(ep_size, stage) for ep_size in (1, 2, 4) for stage in range(4)}
    assert {(c.ep_size, c.zero_stage) for c in every if c.engine == "deepspeed"} == {
        (ep_size, stage) for ep_size in (1, 2, 4) for stage in (1, 2)
    }
    assert {(c.ep_size, c.zero_stage) for c in every if c.shard_size} == {(e, s) for e in (1, 2, 4) for s in (1, 2, 3)}
    for case in every:
        assert case.applied(config, 4).parallel.num_stages <= config.model.num_hidden_layers


def test_quick_covers_every_axis() -> None:
    config = shrunken(run_file("demo.yaml"), 4)
    every, quick = cases(config, 4), cases(config, 4, "quick")
    assert len(quick) <= 20
    for axis in ("pp_size", "schedule", "ep_size", "zero_stage", "shard_size", "accumulation", "recompute", "engine"):
        assert {getattr(case, axis) for case in quick} == {getattr(case, axis) for case in every}
    assert {(c.pp_size, c.schedule) for c in quick} >= {(pp_size, kind) for pp_size in (2, 4) for kind in SCHEDULES}
    assert {(c.ep_size, c.zero_stage) for c in quick} == {(e, z) for e in (1, 2, 4) for z in range(4)}
    assert {c.recompute for c in quick if c.pp_size > 1} == set(RECOMPUTE)


def test_layouts_are_named() -> None:
    config = shrunken(run_file("demo.yaml"), 4)
    names = "ep2-zero3-full,ep1-zero0,pp2-1f1b-ep2-zero1-acc4-full,ep4-zero2-shard2-acc2,ep1-zero1-deepspeed"
    assert [case.name for case in cases(config, 4, names)] == names.split(",")
    for name, reason in {
        "ep3-zero0": "parallel.ep_size=3: must divide model.num_experts=8",
        "ep8-zero0": "world_size=4: not a multiple of",
        "ep2-zero5": "Input should be 0, 1, 2 or 3",
        "ep2-zero0-shard2": "parallel.shard_size=2: nothing is sharded",
        "ep1-zero1-shard3": "parallel.shard_size=3: must divide the 4 replicas",
        "pp2-zero_bubble-ep1-zero0-acc2": "needs at least 3 micro-batches",
        "ep1-zero3-deepspeed": "1 or 2 with parallel.engine=deepspeed",
        "ep2-quick": "'quick' is not understood; a layout is named like ep2-zero3-acc2-full",
        "ep2-ep4": "'ep4' is not understood",
    }.items():
        with pytest.raises(ConfigError) as caught:
            cases(config, 4, name)
        assert f"--layouts {name}: " in str(caught.value)
        assert reason in str(caught.value)


def test_without_the_package_deepspeed_is_left_out() -> None:
    with patch("moe_dist.verify.layouts.find_spec", return_value=None):
        every = cases(shrunken(run_file("demo.yaml"), 4), 4)
    assert {case.engine for case in every} == {"torch"}


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


@pytest.mark.parametrize(
    ("routing", "wanted"),
    [
        ({"num_experts": 160, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3}, (16, 6)),  # DeepSeek-V2
        ({"num_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}, (16, 8)),  # DeepSeek-V3
        ({"num_experts": 64, "num_experts_per_tok": 4, "n_group": 16, "topk_group": 1}, (32, 2)),
        ({"num_experts": 12, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 1}, (12, 2)),
        ({"num_experts": 2, "num_experts_per_tok": 2}, (2, 2)),
        ({"num_experts": 3, "num_experts_per_tok": 2}, (3, 2)),
        ({"num_experts": 64, "num_experts_per_tok": 1, "norm_topk_prob": False}, (8, 1)),
        ({"num_experts": 128, "num_experts_per_tok": 8}, (8, 4)),
    ],
)
def test_every_routing_shrinks(routing: dict[str, Any], wanted: tuple[int, int]) -> None:
    """Seen to fail before: no experts at all with 16 groups, a stack trace with DeepSeek-V2's and with 2 experts."""
    small = shrunken(Config.model_validate({"model": routing}), 4).model
    assert (small.num_experts, small.num_experts_per_tok) == wanted
    assert small.moe_layers


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ({"num_hidden_layers": 4, "mlp_only_layers": [1]}, [0, 2, 3, 4, 6, 7]),
        ({"num_hidden_layers": 24, "decoder_sparse_step": 2}, [1, 3, 5, 7]),
        ({"num_hidden_layers": 60, "mlp_only_layers": [0, 1, 2]}, [3, 4, 5, 6, 7]),
        ({"num_hidden_layers": 24, "decoder_sparse_step": 12}, [4, 5, 6, 7]),
        ({"num_hidden_layers": 6, "num_experts": 0}, []),
    ],
)
def test_the_pattern_of_layers_stays(pattern: dict[str, Any], wanted: list[int]) -> None:
    """Two stages of a layer for each of four ranks, dense and expert layers in the order they had."""
    small = shrunken(Config.model_validate({"model": pattern}), 4)
    assert small.model.num_hidden_layers == 8
    assert small.model.moe_layers == wanted


@pytest.mark.dist
def test_the_command_says_what_differs(tmp_path: Path) -> None:
    """A table, one line of verdict, exit code 1; nothing else on standard error, nothing written."""
    command = [sys.executable, "-m", "launcher", "verify", str(ROOT / "configs" / "demo.yaml"), "-n", "2"]
    command += ["--layouts", "ep1-zero0,pp2-1f1b-ep1-zero0-acc2", "--plant", "norm_of_the_last_stage"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert any(line.startswith("ep1-zero0") and line.endswith("pass") for line in lines)
    assert any(line.startswith("pp2-1f1b-ep1-zero0-acc2") and line.endswith("FAIL") for line in lines)
    assert lines[-1] == "1 of 2 layouts differ from one process"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plant", "gremlin"], "--plant gremlin: not a known bug; allowed: expert_gradient_times_ep, "),
        (["--layouts", "pp2-1f1b-ep1-zero2-acc2"], "--layouts pp2-1f1b-ep1-zero2-acc2: parallel.zero_stage=2: with "),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "launcher", "verify", "configs/demo.yaml", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
