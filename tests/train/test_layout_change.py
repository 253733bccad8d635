"""A run stopped in one layout goes on in another: same samples, same experts, same losses."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import mesh_of

from moe_dist.config import load_mapping
from moe_dist.train import MoETrainer

pytestmark = pytest.mark.dist
Place = int | tuple[int, int] | tuple[int, int, str] | None
TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * 12 for i in range(24)]


def losses(
    folder: str, ep_size: int, max_steps: int, optim: str, zero_stage: int = 0, engine: str = "torch"
) -> list[float]:
    """Train to `max_steps` (resuming what is in `folder`), 8 sequences a step whatever the number of ranks."""
    mesh = mesh_of(ep_size)
    tree = {
        "model": {
            "vocab_size": 272,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "moe_intermediate_size": 32,
            "num_experts": 8,
        },
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4 // mesh.layout.dp_size,
            "max_steps": max_steps,
            "output_dir": folder,
        },
        "data": {"max_seq_length": 32, "validation_split": 0.0},
        "parallel": {"ep_size": ep_size, "zero_stage": zero_stage, "engine": engine},
        "optimizer": {"optim": optim, "lr_scheduler_type": "constant", "adam_epsilon": 1e-6, "momentum": 0.9},
        "balance": {"bias_update_rate": 1e-3, "aux_loss_scope": "sequence"},
        "monitor": {"progress": "none", "tensorboard": False},
    }
    return MoETrainer(load_mapping(tree), mesh=mesh).train(TEXTS).losses


@pytest.mark.parametrize(
    ("optim", "before", "after"),
    [
        ("adamw_torch_fused", (2, 3), (4, 0)),
        ("adamw_torch_fused", (4, 0), (1, 3)),
        ("adamw_torch_fused", (1, 1), (2, 2)),
        ("sgd", (2, 2), None),
        ("adamw_torch_fused", (2, 1, "deepspeed"), (2, 1, "deepspeed")),
        ("adamw_torch_fused", (2, 2, "deepspeed"), None),
        ("adamw_torch_fused", 4, (1, 1, "deepspeed")),
        ("adamw_torch_fused", (1, 3), (4, 2, "deepspeed")),
        ("adamw_torch_fused", (4, 1, "deepspeed"), (2, 3)),
        ("sgd", (2, 2, "deepspeed"), (4, 1, "deepspeed")),
        *(("adamw_torch_fused", a, b) for a, b in itertools.permutations((1, 2, 4), 2)),
        ("adamw_torch_fused", None, 4),
        ("adamw_torch_fused", 4, None),
        ("adafactor", 4, 2),
        ("sgd", 2, None),
    ],
)
def test_resume_in_another_layout(tmp_path: Path, optim: str, before: Place, after: Place) -> None:
    """Experts keep their numbers and their optimizer state. `None`: one process; a number: ep size on 4 ranks;
    a pair: ep size and zero_stage; a triple: these and the engine.

    Seen to fail with stacked experts saved as plain tensors: ranks then overwrite each other's block.
    """

    def go(folder: Path, place: Place, max_steps: int) -> list[float]:
        if place is None:
            return losses(str(folder), 1, max_steps, optim)
        ep_size, *sharding = place if isinstance(place, tuple) else (place, 0)
        results = run_ranks(losses, 4, str(folder), ep_size, max_steps, optim, *sharding)
        assert all(result == results[0] for result in results)
        return results[0]

    straight = go(tmp_path / "straight", None, 6)
    go(tmp_path / "two", before, 3)
    assert go(tmp_path / "two", after, 6) == pytest.approx(straight[3:], rel=2e-5)
