"""Whole runs on a pipeline: a bad step, a time budget; ranks of all stages decide the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patches import replaced
from ranks import run_ranks
from tiny import mesh_of
from torch import Tensor, nn

from moe_dist.config import load_mapping
from moe_dist.parallel.engines.optimizer import local
from moe_dist.train import MoETrainer
from moe_dist.train.step import StepResult, TrainStep

pytestmark = pytest.mark.dist
TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * 12 for i in range(24)]


def trainer_on(folder: str, zero_stage: int = 0, **train: Any) -> MoETrainer:
    tree = {
        "model": {
            "vocab_size": 272,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "moe_intermediate_size": 32,
            "num_experts": 8,
        },
        "train": {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "output_dir": folder,
            **train,
        },
        "data": {"max_seq_length": 32, "validation_split": 0.0},
        "parallel": {"pp_size": 2, "ep_size": 2, "zero_stage": zero_stage},
        "balance": {"bias_update_rate": 1e-3},
        "monitor": {"progress": "none", "tensorboard": False},
        "checkpoint": {"save_at_end": False},
    }
    return MoETrainer(load_mapping(tree), mesh=mesh_of(2, pp_size=2))


def poison(module: nn.Module, arguments: Any, out: Tensor) -> None:
    """What comes back through `out` is not finite; what goes forward is untouched."""
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient * float("nan"))


def with_bad_steps(folder: str, zero_stage: int, bad_rank: int, policy: str) -> tuple[list[bool], int, int, str, bool]:
    """A gradient on `bad_rank` is NaN in steps 2 and 3: (weights and biases stood still, by step; steps; skipped; why
    it ended; failed).
    """
    trainer = trainer_on(folder, zero_stage, on_nonfinite=policy, max_steps=5)
    call, still = TrainStep.__call__, []

    def watched(self: TrainStep, batches: list, step: int, rate: float) -> StepResult:
        tensors = {name: local(value) for name, value in self.model.state_dict().items()}
        before = {name: value.clone() for name, value in tensors.items()}
        hook = None
        if dist.get_rank() == bad_rank and step in (1, 2):
            hook = next(self.model.blocks()).register_forward_hook(poison)
        result = call(self, batches, step, rate)
        if hook is not None:
            hook.remove()
        still.append(all(torch.equal(before[name], value) for name, value in tensors.items()))
        return result

    with replaced(TrainStep, "__call__", watched):
        result = trainer.train(TEXTS)
    return still, result.steps, trainer.parts.counters.skipped, result.reason, result.failed


@pytest.mark.parametrize(("zero_stage", "bad_rank"), [(0, 0), (0, 3), (1, 3)])
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_all_stages_agree_on_a_bad_step(tmp_path: Path, policy: str, zero_stage: int, bad_rank: int) -> None:
    """Trap 9: a NaN on one rank of one stage: no weight and no bias moves on any; `skip` counts, `stop` stops.

    Seen to fail with the norm not summed over `pp`: the last stage, above rank 0's, goes on.
    """
    results = run_ranks(with_bad_steps, 4, str(tmp_path), zero_stage, bad_rank, policy)
    for still, steps, skipped, reason, failed in results:
        if policy == "skip":
            assert (still, steps, skipped, failed) == ([False, True, True, False, False], 5, 2, False)
            assert reason == "all 5 steps done"
        else:
            assert (still, steps, skipped, failed) == ([False, True], 2, 1, True)
            assert "not finite at step 2" in reason


def with_clocks_apart(folder: str) -> tuple[int, str]:
    """One second by the clock of rank 0; by the others' it is over before it begins."""
    trainer = trainer_on(folder, max_time=1.0, num_train_epochs=None)
    begin = MoETrainer._begin

    def early(self: MoETrainer) -> None:
        begin(self)
        self.started -= 1000.0 * dist.get_rank()

    with replaced(MoETrainer, "_begin", early):
        result = trainer.train(TEXTS * 40)
    return result.steps, result.reason


def test_all_stages_stop_at_the_same_step(tmp_path: Path) -> None:
    """Seen to fail with each rank's own clock: rank 1 stops after its first step, the others wait for it."""
    results = run_ranks(with_clocks_apart, 4, str(tmp_path))
    assert len(set(results)) == 1
    steps, reason = results[0]
    assert steps >= 1
    assert reason == "the time budget of 1 s is used up"
