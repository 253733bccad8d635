"""Flip single bits in a checkpoint, one at a time, and see whether each one is found before anything is loaded.

    python tools/flip.py --flips 10000                     # a tiny checkpoint, trained on the spot
    python tools/flip.py outputs/run/checkpoint-500        # a copy of your own; it is never written to

File, byte and bit are drawn from a seed: first the file (each as often as the others, so that the small ones get
their share), then the bit. The checkpoint is then asked for in the way a run does (`Checkpoints.find`, and
`read_tensors` when that lets it pass), and put right again. Exit code 1 when a flip was not found.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from moe_dist.checkpoint.tools.flipping import flip


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
    training = {"max_seq_length": 32, "max_steps": 2, "save_steps": 1, "progress": "none", "tensorboard": False}
    trainer = MoETrainer(model_config=model | experts, training_config=training, output_dir=folder / "run")
    trainer.train([f"text number {n} " * 40 for n in range(12)])
    return folder / "run" / "checkpoints" / "checkpoint-2"


if __name__ == "__main__":
    sys.exit(main())
