"""One GPU against one process on the CPU: float32, and bfloat16 within its own tolerance."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from moe_dist.config import load_config
from moe_dist.parallel.mesh import Mesh
from moe_dist.verify.run import Verifier
from moe_dist.verify.verdicts import Report

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FILE = Path(__file__).parents[2] / "configs" / "demo.yaml"


def test_one_gpu_computes_what_the_cpu_computes() -> None:
    """`moe-dist verify -n 1`: every value of every feature, float64, float32 and bfloat16.

    Matmuls in float32 as such: TF32 would be off by 1e-3.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    config, printed = load_config(FILE, notice=lambda text: None), io.StringIO()
    with redirect_stdout(printed):
        passed = Verifier(Mesh.single("cuda")).verify(config, "quick", report=Report("verify", as_json=True))
    report = json.loads(printed.getvalue())
    assert passed, report
    assert {row["precision"] for row in report["layouts"]} == {"float64", "float32", "bfloat16"}


@pytest.mark.parametrize("plant", ["router_cut_from_loss", "loss_by_local_tokens", "auxiliary_loss_by_local_tokens"])
def test_bugs_are_planted_on_a_gpu_too(plant: str) -> None:
    """Without an error; with one process the last two compute what they should."""
    config = load_config(FILE, (), notice=lambda text: None)
    with redirect_stdout(io.StringIO()):
        passed = Verifier(Mesh.single("cuda")).verify(config, "ep1-zero0,ep1-zero0-acc2", plant)
    assert passed == plant.endswith("local_tokens")
