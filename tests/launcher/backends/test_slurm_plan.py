"""What `moe-dist launch slurm` would submit, told without Slurm; what it does there is in test_slurm.py."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from programs import BIN

from launcher.backends import kubernetes, mpirun
from launcher.backends.slurm import Request, followed, plan
from moe_dist.config import Config, ConfigError, load_config

ROOT = Path(__file__).parents[3]
DEMO = str(ROOT / "configs" / "demo.yaml")
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


def demo(*overrides: str) -> Config:
    return load_config(DEMO, overrides)


def test_every_wish_becomes_one_word_for_sbatch() -> None:
    wishes = {"cpus_per_task": 4, "gpus_per_node": "h100:8", "mem": "500G", "time": "1-12", "partition": "big"}
    request = Request(2, 4, **wishes, account="us", qos="high", job_name="my run", options=("--exclusive",))  # type: ignore[arg-type]
    job = plan(DEMO, ["train.max_steps=5"], demo("launch.grace_period=90.5"), request)
    assert job.command[0] == "sbatch"
    assert job.command[1:] == (
        *("--job-name=my run", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=4", "--gpus-per-node=h100:8"),
        *("--mem=500G", "--time=1-12", "--partition=big", "--account=us", "--qos=high", "--signal=B:USR1@111"),
        *("--exclusive", str(job.script), DEMO, "train.max_steps=5"),
    )
    assert job.variables == {"MOE_DIST_PYTHON": sys.executable, "MOE_DIST_GRACE": "91"}
    assert shlex.split(str(job))[2:] == list(job.command)
    assert "tail -F my run-17.out" in followed(job, "17")


def test_what_nobody_asked_for_is_left_to_the_cluster() -> None:
    job = plan(DEMO, [], demo("parallel.ep_size=1"), Request())
    assert job.command[1:4] == ("--nodes=1", "--ntasks-per-node=1", "--signal=B:USR1@50")
    assert job.script.name == "train.sbatch"
    assert plan(DEMO, [], demo("parallel.ep_size=1"), Request(srun=True)).script.name == "train_srun.sbatch"


def test_an_array_is_one_task_on_one_node_for_each_seed() -> None:
    request = Request(1, 2, cpus_per_task=3, array="1-20:5%2")
    job = plan(DEMO, ["train.output_dir=out"], demo("train.output_dir=out"), request)
    assert {"--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=6", "--array=1-20:5%2"} < set(job.command)
    assert job.command[-5:] == (str(job.script), DEMO, "out", "train.output_dir=out", "launch.nproc_per_node=2")
    assert job.script.name == "array.sbatch"
    assert "tail -F moe-dist-17-*.out" in followed(job, "17")


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(ntasks_per_node=3), "world_size=3: not a multiple of"),
        (Request(ntasks_per_node=2, time="soon"), "--time soon: allowed: minutes, 01:30:00 or 2-00"),
        (Request(ntasks_per_node=2, array="1-"), "--array 1-: allowed: seeds as in"),
        (Request(2, 2, array="1-3"), "--nodes 2: every seed of --array trains on one node"),
        (Request(1, 2, array="1-3", srun=True), "--srun: the seeds of --array start their own ranks"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_what_could_not_work(request_: Request, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(DEMO, [], demo("parallel.ep_size=2"), request_)
    assert str(caught.value).startswith(said)


def test_ranks_are_replanned_before_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `launch local` does. Seen to fail with `Layout.of` alone, both ways: it refuses what training would run, and
    takes what cannot keep the batch."""
    elastic = demo("parallel.elastic=true", "parallel.ep_size=2", "train.output_dir=nowhere")
    assert "--ntasks-per-node=1" in plan(DEMO, [], elastic, Request()).command
    assert mpirun.plan(DEMO, [], elastic, mpirun.Request(ranks=1, mpirun=str(BIN / "mpiexec"))).command
    assert "kind: Job" in kubernetes.manifests(elastic, nodes=1, nproc_per_node=1)
    monkeypatch.setenv("MOE_DIST_GLOBAL_BATCH", "10")
    with pytest.raises(ConfigError, match="no layout keeps the global batch of 10 sequences"):
        plan(DEMO, [], elastic, Request(ntasks_per_node=4))


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "moe-dist", "launch", "slurm", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_dry_run_prints_command_and_script() -> None:
    done = launch("configs/demo.yaml", "--nodes=2", "--ntasks-per-node=1", "--srun", "train.max_steps=5", "--dry-run")
    assert done.returncode == 0, done.stderr
    command, _, rest = done.stdout.partition("\n\n")
    assert shlex.split(command)[-3:] == ["slurm/train_srun.sbatch", "configs/demo.yaml", "train.max_steps=5"]
    name, _, script = rest.partition("\n")
    assert name == "# slurm/train_srun.sbatch"
    assert script == (ROOT / "slurm" / "train_srun.sbatch").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("configs/demo.yaml", "--node=2", "--dry-run"), "node=2: unknown key"),
        (("configs/demo.yaml", "--nodes=none", "--dry-run"), "--nodes none: give a whole number"),
        (("configs/nope.yaml", "--dry-run"), "configs/nope.yaml: no such file"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[1],
)
def test_a_mistake_is_one_line_and_2(words: tuple[str, ...], said: str) -> None:
    done = launch(*words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"moe-dist: error: {said}")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_every_option_has_its_comment(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True, timeout=60, check=True).stderr == b""
    lines = script.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert len(options) >= 6
    assert all(lines[number - 1].startswith("# ") for number in options)
    assert max(map(len, lines)) <= 120
