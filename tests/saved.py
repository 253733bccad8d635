"""Run folders with checkpoints in them, made in this process in a second; and how a test damages a copy."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moe_dist.checkpoint.reading import CheckpointRef
from moe_dist.checkpoint.storage import LocalStorage, open_storage
from moe_dist.checkpoint.storage.manifest import FILE
from moe_dist.train import MoETrainer
from moe_dist.train.trainer import TrainingResult


def trainer_state(step: int) -> dict[str, Any]:
    """The least that a trainer saves beside its tensors."""
    stopping = {"best_loss": None, "evaluations_without_improvement": 0}
    return {"counters": {"step": step}, "stopping": stopping, "data": {"samples_consumed": 0}, "config": {}}


SECRET = "SECRET-MARKER-0123"
TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * 12 for i in range(24)]
MODEL = {
    "vocab_size": 272,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
TRAINING: dict[str, Any] = {
    "max_seq_length": 32,
    "per_device_train_batch_size": 2,
    "seed": 1,
    "max_steps": 6,
    "save_steps": 2,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "progress": "none",
    "tensorboard": False,
    "logging_steps": 1,
    "sample_prompt": SECRET,
    "validation_split": 0.2,
    "eval_batches": 1,
    "bias_update_rate": 1e-3,
}


def train(run: Path, /, **options: Any) -> TrainingResult:
    """A tiny run of six steps that saves every second one."""
    return MoETrainer({}, model_config=MODEL, training_config=TRAINING | options, output_dir=run).train(TEXTS)


@cache
def trained(seed: int = 1) -> Path:
    """A finished run with steps 2, 4 and 6; not to be changed. Another seed is another run."""
    root = Path(tempfile.mkdtemp(prefix="trained-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    train(root / "run", seed=seed, eval_steps=2)
    return root / "run"


def state(step: int) -> Any:
    """A few tensors that tell of which step they are, for a `Checkpoints` without a model."""
    names = ("model.a", "model.b", "optimizer.a.exp_avg")
    tensors = {name: torch.full((64, 3), float(step)) for name in names}
    return SimpleNamespace(tensors=tensors, model_shapes={}, wrong_shapes=list)


def copy_of(run: Path, folder: Path) -> Path:
    """A run folder to be damaged."""
    shutil.copytree(run, folder)
    return folder


def found_at(place: Path | str, step: int) -> CheckpointRef:
    return CheckpointRef(open_storage(place) if isinstance(place, str) else LocalStorage(place), step)


def shard_of(checkpoint: Path) -> Path:
    """Its first shard."""
    return sorted(checkpoint.glob("shard-*.safetensors"))[0]


def rewrite_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and put its checksum right: as an attacker would, not as a disk does."""
    body = json.loads((checkpoint / FILE).read_text())
    del body["checksum"]
    change(body)
    body["checksum"] = hashlib.sha256(canonical(body)).hexdigest()
    (checkpoint / FILE).write_bytes(canonical(body))


def canonical(body: Any) -> bytes:
    """The text that a manifest's checksum is of."""
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\n"
