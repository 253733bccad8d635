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
import torch
from patches import replaced
from ranks import run_ranks
from tiny import mesh_of

from moe_dist.config import Config, ConfigError, checks, load_config
from moe_dist.models.experts import Expert
from moe_dist.models.recompute import is_recomputing
from moe_dist.parallel.mesh import Mesh
from moe_dist.verify.cases import choose
from moe_dist.verify.run import Verifier
from moe_dist.verify.scenarios import Smallness
from moe_dist.verify.verdicts import Report, Verdict

ROOT = Path(__file__).parents[2]


def run_file(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / name, overrides, notice=lambda text: None)


def outcomes(config: Config, asked: list[tuple[str, str | None]]) -> list[tuple[bool, Any]]:
    """(passed, what rank 0 printed as JSON) for every (layouts, plant): one set of process groups serves all."""
    verifier, told = Verifier(mesh_of(1)), []
    for layouts, plant in asked:
        printed = io.StringIO()
        with redirect_stdout(printed):
            passed = verifier.verify(config, layouts, plant, report=Report("verify", as_json=True))
        told.append((passed, json.loads(printed.getvalue() or "null")))
    return told


def failed(report: Any) -> list[str]:
    return [row["layout"] for row in report["layouts"] if not row["passed"]]


SOME = (
    "ep1-zero1,ep4-zero3+z_loss+bias+groups,pp2-1f1b-ep2-zero1-acc4-full+own_experts+cosine,ep2-zero1-acc2-deepspeed,"
    "ep2-zero3-shard2+biased_experts+sgd,brief:ep2-zero1>pp2-1f1b-ep1-zero1-acc2>ep1-zero0+bias+expert_dropout+cosine"
)


@pytest.mark.dist
def test_a_few_cases_pass() -> None:
    """Of each kind one: `quick` and `all` are slow tests."""
    for ((passed, report),) in run_ranks(outcomes, 4, run_file("demo.yaml"), [(SOME, None)], timeout=250):
        assert passed, report


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_quick_passes() -> None:
    """Every value of every feature and of every axis of a layout, the run file's own features, and a brief life."""
    results = run_ranks(outcomes, 4, run_file("demo.yaml"), [("quick", None)], timeout=900)
    report = results[0][0][1]
    assert [(row["layout"], row["error"], row["failed_on"]) for row in report["layouts"] if not row["passed"]] == []
    assert [passed for ((passed, _),) in results] == [True] * 4
    assert len(report["layouts"]) >= 25
    assert results[1][0][1] is None  # only rank 0 prints
    furthest = [
        max(row.get(c, 0.0) for c in ("gradients", "weights"))  # a life is held against one process by other columns
        for row in report["layouts"]
        if row["precision"] == "float64"
    ]
    assert max(furthest) < 1e-11  # rounding is far below what is called a mistake


@pytest.mark.dist
@pytest.mark.proof
@pytest.mark.timeout(3000)
def test_every_pair_and_every_life_passes() -> None:
    results = run_ranks(outcomes, 4, run_file("demo.yaml"), [("all", None)], timeout=2900)
    ((passed, report),) = results[0]
    assert failed(report) == []
    assert passed
    assert len(report["layouts"]) >= 100
    assert sum(row["layout"].startswith("life") for row in report["layouts"]) >= 5


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", ["mixtral_8x7b.yaml", "qwen3_30b_a3b.yaml"])
def test_run_files_of_their_own(file: str) -> None:
    layouts = "ep4-zero3,ep2-zero1-acc2,pp2-1f1b-ep2-zero0-acc4-full,ep1-zero2"
    for ((passed, report),) in run_ranks(outcomes, 4, run_file(file), [(layouts, None)], timeout=280):
        assert passed, report


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_ranks() -> None:
    """pp 2 x edp 2 x ep 2, where every kind of group has two ranks; and every schedule on pp 4 x ep 2."""
    layouts = "pp2-1f1b-ep2-zero0-acc2,pp2-dualpipe_v-ep2-zero1-acc4-full,pp2-interleaved_1f1b-ep2-zero3-acc2"
    for schedule in ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "dualpipe_v"):
        layouts += f",pp4-{schedule}-ep2-zero0-acc8+bias+sequence_scope+z_loss"
    for ((passed, report),) in run_ranks(outcomes, 8, run_file("demo.yaml"), [(layouts, None)], timeout=500):
        assert passed, report


def test_in_bfloat16_a_bug_is_seen_too() -> None:
    """With a tolerance of its own. Both sides are on the CPU here; `moe-dist verify -n 1` on a machine with CUDA holds
    the GPU against the CPU.
    """
    layouts = "ep1-zero0-bf16,ep1-zero0-acc2-full-bf16"
    (passed, report), (_, wrong) = outcomes(run_file("demo.yaml"), [(layouts, None), (layouts, "router_cut_from_loss")])
    assert passed, report
    assert [row["precision"] for row in report["layouts"]] == ["bfloat16"] * 2
    assert failed(wrong) == layouts.split(",")


@pytest.mark.dist
def test_every_replica_is_looked_at() -> None:
    """Weights of the last rank lag behind: the losses and what rank 0 holds are right. Its `ep` peer sees them too."""
    plant = "replica_misses_the_last_update"
    for passed, report in (told[0] for told in run_ranks(outcomes, 4, run_file("demo.yaml"), [("ep2-zero0", plant)])):
        assert not passed
        if report is not None:
            (row,) = report["layouts"]
            assert row["failed_on"] == [2, 3]
            assert max(row[column] for column in ("losses", "gradients", "norms")) < 1e-9 < row["weights"]


def test_a_bug_that_is_not_seen_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """One process has no expert parallelism to go wrong: green with the bug, so exit code 5 and no praise."""
    from launcher.connect.environment import detect
    from launcher.connect.exit_codes import EXIT_UNSEEN
    from launcher.connect.rank_job import Proof
    from launcher.rank.worker import verify

    assert (
        verify(run_file("demo.yaml", "parallel.ep_size=1"), detect(), Proof("ep1-zero0", "expert_gradient_times_ep"))
        == EXIT_UNSEEN
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "The bug expert_gradient_times_ep was not seen: 1 cases pass with it"


class Brittle(Expert):
    """Breaks when its forward pass is repeated."""

    def forward(self, x_RD: torch.Tensor) -> torch.Tensor:
        if is_recomputing():
            raise ArithmeticError("it is broken")
        return 2 * x_RD


def broken(layouts: str) -> Any:
    return outcomes(run_file("demo.yaml", "model.expert=test_verify:Brittle"), [(layouts, None)])[0]


@pytest.mark.dist
def test_a_case_that_breaks_on_all_ranks_does_not_end_the_proof() -> None:
    for passed, report in run_ranks(broken, 2, "ep1-zero0,ep1-zero0-full,ep1-zero0-acc2"):
        assert not passed
        if report is not None:
            errors = {row["layout"]: row["error"] for row in report["layouts"]}
            assert errors == {
                "ep1-zero0": None,
                "ep1-zero0-full": "ArithmeticError: it is broken",
                "ep1-zero0-acc2": None,
            }


class Deadly(Expert):
    """Ends the process when its forward pass is repeated."""

    def forward(self, x_RD: torch.Tensor) -> torch.Tensor:
        if is_recomputing():
            import os

            os._exit(7)
        return 2 * x_RD


@pytest.mark.dist
def test_a_case_that_ends_a_rank_does_not_end_the_proof(tmp_path: Path) -> None:
    """The ranks start again with the next case; the summary is of all."""
    command = [sys.executable, "-m", "launcher", "verify", str(ROOT / "configs" / "demo.yaml"), "-n", "2"]
    command += ["model.expert=test_verify:Deadly", "--layouts", "ep1-zero0,ep1-zero0-full,ep1-zero0-acc2", "--json"]
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 1, done.stderr
    rows = {row["layout"]: row for row in json.loads(done.stdout)["layouts"]}
    assert [name for name, row in rows.items() if row["passed"]] == ["ep1-zero0", "ep1-zero0-acc2"]
    assert "the ranks ended in it" in rows["ep1-zero0-full"]["error"]


def test_infinity_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Seen to fail with a bare Infinity, which no parser but Python's reads."""
    report = Report("verify", as_json=True)
    report.add(Verdict("ep1-zero0", "float64", {"gradients": float("inf")}, [0], 1.0))
    report.end()
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told["layouts"][0]["gradients"] == "Infinity"


def wrong_smoothing(layouts: str) -> Any:
    from moe_dist.train import step

    right = step.head_cross_entropy

    def wrong(*tensors_and_smoothing: Any, **options: Any) -> torch.Tensor:
        *tensors, smoothing = tensors_and_smoothing
        return right(*tensors, smoothing * (2.0 if torch.distributed.get_rank() == 1 else 1.0), **options)

    with replaced(step, "head_cross_entropy", wrong):
        return outcomes(run_file("demo.yaml"), [(layouts, None)])[0]


@pytest.mark.dist
def test_what_fails_is_made_small() -> None:
    """The only feature that matters is left, and the command that repeats it alone is told."""
    name = "ep2-zero1+bias+dense_layer+label_smoothing+z_loss"
    passed, report = run_ranks(wrong_smoothing, 2, name)[0]
    assert not passed
    assert report["layouts"][0]["smallest"] == "ep2-zero1+label_smoothing"


def without_the_refusal(layouts: str) -> tuple[bool, Any]:
    with replaced(checks, "check_pipeline", lambda config: None):
        return outcomes(run_file("demo.yaml"), [(layouts, None)])[0]


@pytest.mark.dist
@pytest.mark.parametrize("schedule", ["zero_bubble", "dualpipe_v"])
def test_what_is_refused_would_be_seen(schedule: str) -> None:
    """Freed parameters under a split backward train silently wrong in PyTorch: refused, and red were it not."""
    layout = f"pp2-{schedule}-ep1-zero3-acc4"
    with pytest.raises(ConfigError, match=f"{layout}: parallel.zero_stage=3: parallel.schedule={schedule} needs whole"):
        choose(Smallness(run_file("demo.yaml"), 4), layout)
    for passed, report in run_ranks(without_the_refusal, 4, layout):
        assert not passed, report


@pytest.mark.dist
def test_the_command_says_what_differs(tmp_path: Path) -> None:
    """A line for each case, one of verdict, exit code 1; nothing else on standard error, nothing written."""
    command = [sys.executable, "-m", "launcher", "verify", str(ROOT / "configs" / "demo.yaml"), "-n", "2"]
    command += ["--layouts", "ep1-zero0,pp2-1f1b-ep1-zero0-acc2", "--plant", "norm_of_the_last_stage"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert any(line.startswith("pass") and line.endswith(" ep1-zero0") for line in lines)
    assert any(line.startswith("FAIL") and line.endswith(" pp2-1f1b-ep1-zero0-acc2") for line in lines)
    assert lines[-1] == "1 of 2 cases differ from one process"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plant", "gremlin"], "--inject-bug gremlin: not a known bug; allowed: expert_gradient_times_ep, "),
        (["--layouts", "pp2-1f1b-ep1-zero2-acc2"], "--layouts pp2-1f1b-ep1-zero2-acc2: parallel.zero_stage=2: with "),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "launcher", "verify", "configs/demo.yaml", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_bug_that_is_never_reached_is_an_error() -> None:
    """Of its own: the cases are green, and have not met it. Seen red: "The bug ... was not seen"."""
    verifier, bug = Verifier(Mesh.single()), "auxiliary_loss_scaled_by_the_schedule"
    with pytest.raises(ConfigError, match=f"--inject-bug {bug}: nothing has called what it replaces in 1 cases"):
        verifier.verify(run_file("demo.yaml"), "ep1-zero0", bug)
