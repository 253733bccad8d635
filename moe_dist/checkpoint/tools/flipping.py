"""Bits of a checkpoint flipped one at a time, and a load as a run does it: for `tools/flip.py` and the tests."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import torch

from moe_dist.checkpoint.manager import Checkpoints
from moe_dist.checkpoint.shards import TORCH_DTYPES
from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.config import CheckpointConfig
from moe_dist.parallel.mesh import Mesh


class Weights:
    """What a run would load into: zeros, which anything that is applied would change."""

    def __init__(self, storage: LocalStorage, step: int) -> None:
        entries = storage.manifest(step).tensors
        self.tensors = {
            name: torch.zeros(entry.shape, dtype=TORCH_DTYPES[entry.dtype]) for name, entry in entries.items()
        }

    def finish_reading(self) -> None:
        """Nothing to put back."""

    @property
    def touched(self) -> bool:
        """Whether anything has been applied."""
        return any(bool(tensor.any()) for tensor in self.tensors.values())


def load(storage: LocalStorage, step: int, state: Weights) -> str | None:
    """Go on from a step as a run does. Returns why not, None when it was loaded."""
    checkpoints = Checkpoints(storage, Mesh.single(), CheckpointConfig())
    try:
        found = checkpoints.find(str(step), lambda text: None)
        assert found is not None
        checkpoints.read_tensors(checkpoints.read_state(found), state)  # type: ignore[arg-type]
    except CheckpointError as error:
        return str(error)
    return None


def flip(checkpoint: Path, flips: int, seed: int = 1) -> tuple[Counter[str], Counter[str], int]:
    """(flips, flips found) by kind of file, and how many were applied to weights. Works on `checkpoint` itself."""
    storage, step = LocalStorage(checkpoint.parent), int(checkpoint.name.rpartition("-")[2])
    state = Weights(storage, step)
    draw = random.Random(seed)
    files = sorted(file for file in checkpoint.iterdir() if file.is_file())
    done: Counter[str] = Counter()
    detected: Counter[str] = Counter()
    applied = 0
    for _ in range(flips):
        file = draw.choice(files)
        offset, bit = draw.randrange(file.stat().st_size), draw.randrange(8)
        kind = "shards" if file.suffix == ".safetensors" else file.name
        descriptor = os.open(file, os.O_RDWR)
        right = os.pread(descriptor, 1, offset)
        os.pwrite(descriptor, bytes([right[0] ^ 1 << bit]), offset)
        reason = load(storage, step, state)
        os.pwrite(descriptor, right, offset)
        os.close(descriptor)
        done[kind] += 1
        detected[kind] += reason is not None and file.name in reason
        if state.touched:
            applied += 1
            state = Weights(storage, step)
    assert load(storage, step, state) is None, "the checkpoint was not put right again"
    assert state.touched
    return done, detected, applied
