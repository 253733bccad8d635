"""What a person has who installs the package and has no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_has_all_that_a_newcomer_needs(tmp_path: Path) -> None:
    """Seen red: without the package data `init` laid down nothing, and `launch k8s` named a checkout."""
    source, folder = tmp_path / "source", tmp_path / "empty"
    for name in ("launcher", "moe_dist", "configs", "k8s", "slurm"):  # a build leaves folders in its source
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run([*pip, *wheels], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=120)
    shutil.rmtree(source)

    def ask(*words: str, there: Path = folder) -> str:
        ours = {"PYTHONPATH": str(site), "MOE_DIST_PYTHON": sys.executable}
        command = [sys.executable, "-m", "launcher", *words]
        done = subprocess.run(
            command, cwd=there, env={**os.environ, **ours}, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr.replace("note:", "")) == (0, done.stderr.replace("note:", ""))
        return done.stdout

    ask("init", "x")
    assert [path.name for path in (folder / "x").iterdir()] == ["demo.yaml"]
    for template in ("pretrain", "finetune", "slurm", "k8s"):
        ask("init", template, "--template", template)
    laid_down = sorted(folder.glob("*/*.yaml"))
    assert len(laid_down) > 12
    for path in laid_down:
        assert "num_experts: " in ask("check", str(path), "--show-config")
    assert json.loads(ask("check", "x/demo.yaml", "--json"))["world_size"] == 2
    for name, part in (("slurm/train.sbatch", "slurm"), ("k8s/base/job.yaml", "k8s")):
        assert (folder / part / name).read_bytes() == (ROOT / name).read_bytes()
    for name in ("alerts.yml", "grafana.json"):
        assert (folder / "k8s/monitoring" / name).read_bytes() == (ROOT / "moe_dist/monitor" / name).read_bytes()
    x = folder / "x"
    kinds = {item["kind"] for item in yaml.safe_load_all(ask("launch", "k8s", "demo.yaml", "--dry-run", there=x))}
    assert kinds >= {"Job", "Service", "ConfigMap"}
    assert "#SBATCH" in ask("launch", "slurm", "demo.yaml", "--nodes=1", "--dry-run", there=x)
    short = ["max_time=null", "max_steps=2", "data.limit=50", "eval_steps=0", "sample_tokens=0", "progress=plain"]
    out = ask("train", "demo.yaml", "nproc_per_node=1", "ep_size=1", "device=cpu", *short, there=x)
    assert "all 2 steps done" in out
    assert (x / "outputs/demo/checkpoint-2").is_dir()
