"""`python -m moe_dist` and `python -m moe_dist.train`: the ways in that torchrun and programs take."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from programs import BIN, Program, metrics

ROOT = Path(__file__).parents[3]
ONE_STEP = ("train.max_steps=1", "launch.device=cpu", "train.eval_steps=0", "train.sample_tokens=0")

pytestmark = pytest.mark.dist


def test_another_launcher_is_in_the_way(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the same name where the command is given, as another project may have. Seen to fail with ranks
    started by `-m launcher.rank.worker`."""
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "__init__.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    command = (sys.executable, "-m", "moe_dist", "train", config, *ONE_STEP, f"train.output_dir={tmp_path / 'run'}")
    program = Program(*command)
    assert program.end() == 0, program.err
    assert len(metrics(tmp_path / "run", "train")) == 1


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("words", [("--config", "configs/distributed.yaml"), ("configs/distributed.yaml",)])
def test_torchrun_by_module(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As people type it: a module, and the run file behind `--config`."""
    monkeypatch.chdir(ROOT)
    torchrun = (BIN / "torchrun", "--nproc_per_node=4", "-m", "moe_dist.train", *words)
    program = Program(*torchrun, *ONE_STEP, f"train.output_dir={tmp_path / 'run'}", OMP_NUM_THREADS="1")
    assert program.end() == 0, program.err
    assert len(metrics(tmp_path / "run", "train")) == 1
