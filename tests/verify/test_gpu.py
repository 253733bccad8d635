"""One GPU against one process on the CPU: float32, and bfloat16 within its own tolerance."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from moe_dist.config_loading import load_config
from moe_dist.parallel.mesh import Mesh
from moe_dist.verify.run import Verifier
from moe_dist.verify.trial import BF16_TOLERANCE, TOLERANCE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FILE = Path(__file__).parents[2] / "configs" / "demo.yaml"


@pytest.mark.parametrize("option", ["balance.bias_update_rate=0.01", "balance.capacity_factor=0.8"])
def test_one_gpu_computes_what_the_cpu_computes(option: str) -> None:
    """`moe-dist verify -n 1`: one or two micro-batches, with and without recomputation, float32 and bfloat16.

    Matmuls in float32 as such: TF32 would be off by 1e-3.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    config, printed = load_config(FILE, [option], notice=lambda text: None), io.StringIO()
    with redirect_stdout(printed):
        passed = Verifier(Mesh.single("cuda")).verify(config, "all", as_json=True)
    report = json.loads(printed.getvalue())
    assert passed, report
    rows = {row["layout"]: row for row in report["layouts"]}
    assert len(rows) == 8
    for name, row in rows.items():
        limits = (
            BF16_TOLERANCE if name.endswith("bf16") else dict.fromkeys(("gradients", "norms", "weights"), TOLERANCE)
        )
        assert all(row[column] < limit for column, limit in limits.items()), row


@pytest.mark.parametrize("plant", ["router_cut_from_loss", "loss_by_local_tokens", "auxiliary_loss_by_local_tokens"])
def test_bugs_are_planted_on_a_gpu_too(plant: str) -> None:
    """Without an error; with one process the last two compute what they should."""
    config = load_config(FILE, (), notice=lambda text: None)
    with redirect_stdout(io.StringIO()):
        passed = Verifier(Mesh.single("cuda")).verify(config, "ep1-zero0,ep1-zero0-acc2", plant, as_json=True)
    assert passed == plant.endswith("local_tokens")
