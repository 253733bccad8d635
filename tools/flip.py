"""Flip single bits in a checkpoint, one at a time, and see whether each one is found before anything is loaded.

    python tools/flip.py --flips 10000                     # a tiny checkpoint, trained on the spot
    python tools/flip.py outputs/run/checkpoint-500        # a copy of your own; it is never written to

File, byte and bit are drawn from a seed: first the file (each as often as the others, so that the small ones get
their share), then the bit. The checkpoint is then asked for in the way a run does (`Checkpoints.find`, and
`read_tensors` when that lets it pass), and put right again. Exit code 1 when a flip was not found.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from moe_dist.checkpoint.manager import Checkpoints
from moe_dist.checkpoint.manifest import CheckpointError
from moe_dist.checkpoint.shards import TORCH_DTYPES
from moe_dist.checkpoint.storage import LocalStorage
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
        pass

    @property
    def touched(self) -> bool:
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
        place, bit = draw.randrange(file.stat().st_size), draw.randrange(8)
        kind = "shards" if file.suffix == ".safetensors" else file.name
        descriptor = os.open(file, os.O_RDWR)
        right = os.pread(descriptor, 1, place)
        os.pwrite(descriptor, bytes([right[0] ^ 1 << bit]), place)
        reason = load(storage, step, state)
        os.pwrite(descriptor, right, place)
        os.close(descriptor)
        done[kind] += 1
        detected[kind] += reason is not None and file.name in reason
        if state.touched:
            applied += 1
            state = Weights(storage, step)
    assert load(storage, step, state) is None, "the checkpoint was not put right again"
    assert state.touched
    return done, detected, applied


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="flip-"))
    try:
        source = options.checkpoint or tiny(folder)
        copy = folder / "copy" / source.name
        shutil.copytree(source, copy)
        sizes = {file.name: file.stat().st_size for file in sorted(copy.iterdir())}
        print("; ".join(f"{name} {size:,} bytes" for name, size in sizes.items()))
        began = time.perf_counter()
        done, detected, applied = flip(copy, options.flips, options.seed)
    finally:
        shutil.rmtree(folder)
    for kind in sorted(done):
        print(f"{kind:20} {done[kind]:6} flips, {detected[kind]:6} detected")
    total = sum(done.values())
    print(
        f"{'all files':20} {total:6} flips, {sum(detected.values()):6} detected, {applied} applied "
        f"(seed {options.seed}, {time.perf_counter() - began:.0f} s)"
    )
    return 0 if detected == done and not applied else 1


def tiny(folder: Path) -> Path:
    """A checkpoint of a few kilobytes with everything in it that a large one has."""
    from moe_dist.train import MoETrainer

    model = {"vocab_size": 272, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    training = {"max_seq_length": 32, "max_steps": 2, "progress": "none", "tensorboard": False}
    trainer = MoETrainer(model_config=model | experts, training_config=training, output_dir=folder / "run")
    trainer.train([f"text number {n} " * 40 for n in range(12)])
    return folder / "run" / "checkpoint-2"


if __name__ == "__main__":
    sys.exit(main())
