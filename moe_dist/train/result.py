"""What a run gives to a program. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingResult:
    """How a run went, over all its starts; only `losses` are those of the steps of this one.

    Losses are nats per token; `failed`: it stopped for a reason a person must look at; `signal`: it was asked to stop
    by this one; `checkpoint`: the last step saved; `weights`: the checkpoint whose weights it has ended with, the best
    with `checkpoint.load_best_model_at_end`; `merged`: the folder of `lora.merge_and_save`.
    """

    initial_loss: float
    final_loss: float
    losses: list[float]
    steps: int
    best_eval_loss: float | None
    unigram_loss: float | None
    reason: str
    failed: bool
    output_dir: Path
    signal: int | None = None
    checkpoint: str | None = None
    weights: str | None = None
    merged: Path | None = None
