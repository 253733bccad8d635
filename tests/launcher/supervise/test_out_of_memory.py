"""`train.auto_find_batch_size`: a step that lacks memory is taken again by all ranks, in smaller micro-batches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from programs import Program, losses

pytestmark = [pytest.mark.dist, pytest.mark.slow]

MODULE = '''
import os

import torch
from moe_dist.models.attention import Attention
from moe_dist.train.callbacks import Callback

exact = Attention.forward


def hungry(self, x, *arguments, **options):
    """On rank 1 there is room for two sequences."""
    if os.environ["RANK"] == "1" and len(x) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return exact(self, x, *arguments, **options)


Attention.forward = hungry


class Hungry(Callback):
    """The module is what is wanted."""
'''
SAVES = ("balance.router_aux_loss_coef=0", "checkpoint.save_steps=2", "launch.max_restarts=0")
ADAPTERS = ("lora.r=2", "lora.init=random", "lora.merge_and_save=true")


def train(config: Path, folder: Path, size: int, *options: str) -> Program:
    """Eight sequences a step, on two ranks."""
    (folder / "hungry.py").write_text(MODULE)
    own = ("train.callbacks=[hungry:Hungry]", "train.auto_find_batch_size=true", f"train.output_dir={folder / 'run'}")
    batch = (f"per_device_train_batch_size={size}", f"gradient_accumulation_steps={4 // size}", "train.max_steps=4")
    environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return Program("moe-dist", "train", config, *own, *batch, *SAVES, *options, **environment)


@pytest.fixture(scope="module")
def twin(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was started with the size for which there is room."""
    folder = tmp_path_factory.mktemp("twin")
    program = train(config, folder, 2, *ADAPTERS)
    assert program.end() == 0, program.err
    return folder / "run"


def test_all_ranks_start_again_with_smaller_micro_batches(config: Path, tmp_path: Path, twin: Path) -> None:
    """Losses bit for bit those of the run that was started so; one line says what was done. No restart is counted.

    And when all is done, rank 0 alone has merged what was trained.
    """
    program = train(config, tmp_path, 4, *ADAPTERS)
    assert program.end() == 0, program.err
    (line,) = [line for line in program.err.splitlines() if "starting again" in line]
    assert line.startswith("moe-dist: error: rank 1: OutOfMemoryError: CUDA out of memory"), line
    assert line.endswith(
        "; starting again at the beginning with micro-batches of 2 x 2 sequences on each replica instead of 1 x 4 "
        "(train.auto_find_batch_size)"
    )
    assert losses(tmp_path / "run") == losses(twin)
    assert (tmp_path / "run" / "merged-4" / "model.safetensors").read_bytes() == (
        twin / "merged-4" / "model.safetensors"
    ).read_bytes()
    assert re.search(r"^merged: .*checkpoint-4 with its model in .*/run/merged-4: qwen3_moe, ", program.out, re.M)
