"""What `train.freeze` and `train_only` hold still in every layout: not moved by a bit; the rest as in one process."""

from __future__ import annotations

import pytest
import torch
from parity import compare, on_layout, passes
from ranks import run_ranks
from tiny import micro_batches
from torch import Tensor

from moe_dist.config.trained_weights import TrainedWeights
from moe_dist.data.packing import PackedDataset
from moe_dist.models.shapes import stack_of
from moe_dist.train.build import build_datasets, build_model
from moe_dist.train.esft import affinity, choose
from moe_dist.verify.trial import Trial

STILL = "balance.bias_update_rate=0"
EXPERTS = "train.train_only=[experts:3,6, router]"
LORA = ("lora.r=4", "lora.init=random", "lora.target_modules=all-linear")
OWN = "model.expert=moe_dist.verify.examples:TwoLinears"
PARTS = "train.freeze=[layers:1, '*norm*', experts]"
ODD = ("model.moe_intermediate_size=21", "model.hidden_size=30", "model.num_attention_heads=2", "model.head_dim=8")
"""No dimension of an expert that four ranks could share."""
LAYOUTS: dict[str, tuple[tuple[str, ...], int, int, int]] = {
    "experts-ep4": ((EXPERTS,), 4, 4, 1),
    "experts-ep2-zero3-acc2-full": (
        (EXPERTS, "parallel.zero_stage=3", "train.gradient_checkpointing=full"),
        *(2, 8, 1),
    ),
    "experts-zero1": ((EXPERTS, "parallel.zero_stage=1"), 1, 4, 1),
    "own-experts-ep2": (("train.train_only=[experts:3]", OWN), 2, 4, 1),
    "adapters-of-experts-ep2-zero2": ((*LORA, "train.freeze=[experts:0-4]", "parallel.zero_stage=2"), 2, 4, 1),
    "upper-layer-zero3-full": (
        ("train.train_only=[layers:2]", "parallel.zero_stage=3", "train.gradient_checkpointing=full"),
        *(2, 4, 1),
    ),
    "layers-pp2-zero_bubble": (
        ("train.train_only=[layers:1-2, experts:3]", "parallel.schedule=zero_bubble", "model.num_hidden_layers=4"),
        *(2, 8, 2),
    ),
    "parts-deepspeed-ep4": (
        (PARTS, "parallel.zero_stage=2", "parallel.engine=deepspeed"),
        *(4, 8, 1),
    ),
}
SLOW = {"experts-zero1", "adapters-of-experts-ep2-zero2", "upper-layer-zero3-full", "layers-pp2-zero_bubble"}
SLOW |= {"parts-deepspeed-ep4", "deepspeed", "zero0-bf16", "zero1-between-experts", "adafactor", "sgd"}
SLOW |= {"own-experts", "layers"}


@pytest.mark.dist
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.proof] * (n in SLOW)) for n in LAYOUTS])
def test_the_rest_is_trained_as_in_one_process(name: str) -> None:
    """Seen to fail with ids of experts counted on each rank of ep."""
    overrides, ep_size, num_micro_batches, pp_size = LAYOUTS[name]
    worst = compare((STILL, *overrides), ep_size, num_micro_batches, pp_size)
    assert passes(worst), worst


FROZEN: dict[str, tuple[tuple[str, ...], int]] = {
    "zero0": ((EXPERTS,), 2),
    "zero0-bf16": ((EXPERTS, "train.pure_bf16=true"), 4),
    "zero3-bf16": ((EXPERTS, "train.pure_bf16=true", "parallel.zero_stage=3"), 2),
    "zero1-between-experts": ((EXPERTS, "parallel.zero_stage=1", *ODD), 1),
    "adafactor": ((EXPERTS, "optimizer.optim=adafactor"), 2),
    "sgd": ((EXPERTS, "optimizer.optim=sgd", "optimizer.momentum=0.9", "parallel.zero_stage=2"), 2),
    "own-experts": ((EXPERTS, OWN), 2),
    "adapters": ((EXPERTS, *LORA), 4),
    "layers": (("train.freeze=[layers:0, embed_tokens]", "parallel.zero_stage=3"), 2),
    "deepspeed": ((PARTS, "parallel.zero_stage=1", "parallel.engine=deepspeed"), 2),
}  # fmt: skip


def moved(overrides: tuple[str, ...], ep_size: int) -> list[str]:
    """What two steps have moved, or keep state of, and must not; what they have not moved, and must."""
    config, mesh = on_layout((STILL, *overrides), ep_size, 4)
    trial = Trial(config, mesh)
    trained = TrainedWeights.of(config)
    before = trial.weights
    for step in range(2):
        trial.step(trial.share(micro_batches(4, step)), step, 1e-2)
    wrong = []
    adapted = bool(config.lora.r)
    for name, weight in trial.weights.items():
        part = trained.part(name) if not adapted or ".lora" in name else False
        moved = _rows(weight, before[name])
        if isinstance(part, frozenset):
            wrong += [] if moved == part else [f"{name}: experts {sorted(moved)} moved"]
        elif bool(moved) != part:
            wrong.append(f"{name} {'moved' if moved else 'did not move'}")
    for name, *_ in trial.engine.named_state():
        stack, is_one = stack_of(name)
        part = trained.part(stack)
        number = int(name.removeprefix(stack)[1:-1]) if is_one else None
        if part is False or (isinstance(part, frozenset) and number not in part):
            wrong.append(f"{name} has state")
    for name, parameter in trial.engine.held_parameters().items():
        if trained.part(name) is False and not trained.experts_of_module(name) and parameter.grad is not None:
            wrong.append(f"{name} has a gradient")
    return wrong


def _rows(now: Tensor, before: Tensor) -> frozenset[int]:
    """Which rows of dimension 0 differ by any bit."""
    bits = {2: torch.int16, 4: torch.int32}[now.element_size()]
    differ = (now.view(bits) != before.view(bits)).reshape(len(now), -1).any(1)
    return frozenset(differ.nonzero().flatten().tolist())


@pytest.mark.dist
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.proof] * (n in SLOW)) for n in FROZEN])
def test_what_is_frozen_stays_bit_for_bit_and_has_no_state(name: str) -> None:
    """Seen to fail with the whole stack in the optimizer, where weight decay moves experts without a gradient."""
    overrides, ep_size = FROZEN[name]
    assert run_ranks(moved, 4, overrides, ep_size) == [[]] * 4


def task_experts(overrides: tuple[str, ...], ep_size: int, pp_size: int) -> tuple[dict[int, list[float]], int]:
    """What this rank measures of the first 11 samples."""
    texts = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(40)]
    config, mesh = on_layout(("model.vocab_size=272", "train.esft_samples=11", *overrides), ep_size, 8, pp_size)
    train = build_datasets(config, texts).train
    assert isinstance(train, PackedDataset)
    return affinity(build_model(config, mesh), train, config, mesh)


@pytest.mark.dist
@pytest.mark.parametrize("score", ["token", pytest.param("gate", marks=pytest.mark.proof)])
def test_experts_of_a_task_are_the_same_in_every_layout(score: str) -> None:
    """Eleven samples: no layout shares them out evenly."""
    wanted, num_tokens = task_experts((f"train.esft_score={score}",), 1, 1)
    assert num_tokens == 11 * 16
    assert all(sum(shares) == pytest.approx(1.0, abs=1e-5) for shares in wanted.values())
    for overrides, ep_size, pp_size in (((), 2, 1), (("parallel.schedule=gpipe",), 2, 2)):
        for shares, count in run_ranks(task_experts, 4, (f"train.esft_score={score}", *overrides), ep_size, pp_size):
            assert count == num_tokens
            assert choose(shares, 0.4) == choose(wanted, 0.4)
            assert all(shares[layer] == pytest.approx(wanted[layer], abs=2e-6) for layer in wanted)
