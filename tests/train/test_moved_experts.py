"""Runs whose experts change ranks: the same losses and the same files as runs whose experts stay."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import mesh_of

from moe_dist.checkpoint.reading import CheckpointRef, read_trainer_state
from moe_dist.checkpoint.storage import open_storage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.tools.inspecting import Tensors
from moe_dist.config import load_mapping
from moe_dist.models.precision import in_dtype
from moe_dist.train import MoETrainer

pytestmark = pytest.mark.dist
TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * 12 for i in range(24)]
BALANCED = {"expert_placement": "balanced", "placement_interval": 2}


def losses(folder: str, max_steps: int, parallel: dict[str, Any]) -> list[float]:
    """Train to `max_steps` in float64, going on from what is in `folder`, 16 sequences a step on any ranks."""
    mesh = mesh_of(parallel.get("ep_size", 1))
    tree = {
        "model": {
            "vocab_size": 272,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "moe_intermediate_size": 16,
            "num_experts": 8,
            "initializer_range": 0.2,  # far from balanced: some exchanges pay at once
        },
        "train": {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4 // mesh.layout.dp_size,
            "max_steps": max_steps,
            "output_dir": folder,
            "max_grad_norm": 0.0,
        },
        "data": {"max_seq_length": 32, "validation_split": 0.0},
        "parallel": {"dispatcher": "all_to_all"} | parallel,
        "optimizer": {"lr_scheduler_type": "constant", "adam_epsilon": 1e-6},
        "balance": {"bias_update_rate": 1e-3, "router_aux_loss_coef": 0.0},
        "checkpoint": {"save_steps": 2},
        "monitor": {"progress": "none", "tensorboard": False, "logging_steps": 1},
    }
    with in_dtype(torch.float64):
        return MoETrainer(load_mapping(tree), mesh=mesh).train(TEXTS).losses


def go(folder: Path, max_steps: int, **parallel: Any) -> list[float]:
    results = run_ranks(losses, 4, str(folder), max_steps, parallel)
    assert all(result == results[0] for result in results)
    return results[0]


def saved(folder: Path, step: int) -> tuple[dict[str, str], Any]:
    """Hash of every tensor by name, and what the checkpoint says of the placement."""
    found = CheckpointRef(open_storage(folder), step)
    manifest = found.storage.manifest(step)
    tensors = Tensors(found, manifest, Keys())
    hashes = {name: hashlib.sha256(tensors.read(name).numpy().tobytes()).hexdigest() for name in tensors.names()}
    return hashes, read_trainer_state(found, manifest, Keys())["placement"]


def test_losses_and_files_are_those_of_experts_that_stay_whatever_goes_on(tmp_path: Path) -> None:
    """Bit for bit in one layout, and to rounding in any other, with and without placement; the map goes on too.

    Seen to fail with experts saved where they are: losses after the first resume.
    """
    stayed = go(tmp_path / "stayed", 8, ep_size=4)
    moved = go(tmp_path / "moved", 3, ep_size=4, **BALANCED)
    moved += go(tmp_path / "moved", 6, ep_size=4, **BALANCED)
    assert moved == stayed[:6]
    (files, none), (files_moved, _) = saved(tmp_path / "stayed", 6), saved(tmp_path / "moved", 6)
    assert none is None
    assert files_moved == files
    slots = saved(tmp_path / "moved", 3)[1]["slots"]
    away = [layer for layer, of_slot in slots.items() if of_slot != [*range(8)]]
    assert away
    rows = [json.loads(line) for line in (tmp_path / "moved" / "metrics.jsonl").read_text().splitlines()]
    by_step = {row["step"]: row["layers"] for row in rows if row["kind"] == "train"}
    for layer in by_step[4]:  # as the start before it has left it
        ranks = [layer["expert_ranks"][expert] for expert in slots[str(layer["layer"])]]
        assert ranks == [0, 0, 1, 1, 2, 2, 3, 3]
        if str(layer["layer"]) in away:
            assert layer["rank_imbalance"] < layer["rank_imbalance_in_order"]

    without = go(tmp_path / "moved", 7, ep_size=4)
    elsewhere = go(tmp_path / "moved", 8, ep_size=2, zero_stage=3, **BALANCED)
    assert [*without, *elsewhere] == pytest.approx(stayed[6:], rel=1e-9)
