"""Adapters in every layout: as in one process, with nothing kept for the frozen weights, which do not move."""

from __future__ import annotations

import hashlib

import pytest
from parity import compare, on_layout, passes
from ranks import run_ranks
from tiny import micro_batches, tiny_config

from moe_dist.config import ConfigError
from moe_dist.parallel.engines.optimizer import local
from moe_dist.parallel.state_bytes import trained_by_pp_rank
from moe_dist.verify.trial import Trial

LORA = (
    "balance.bias_update_rate=0",
    "lora.r=4",
    "lora.alpha=8",
    "lora.dropout=0.1",
    "lora.init=random",
    "lora.target_modules=all-linear",
)
LAYOUTS: dict[str, tuple[tuple[str, ...], int, int, int]] = {
    "ep4": ((), 4, 4, 1),
    "ep2-zero1-acc2": (("parallel.zero_stage=1",), 2, 8, 1),
    "ep2-zero3-acc2-full-dedup": (
        ("parallel.zero_stage=3", "train.gradient_checkpointing=full", "parallel.dispatcher=dedup"),
        *(2, 8, 1),
    ),
    "experts-zero2-selective": (
        ("lora.target_modules=[experts]", "parallel.zero_stage=2", "train.gradient_checkpointing=selective"),
        *(1, 4, 1),
    ),
    "head-zero3": (("lora.target_modules=[lm_head]", "parallel.zero_stage=3"), 2, 4, 1),
    "pp2-zero_bubble": (
        ("lora.target_modules=[q_proj, experts]", "parallel.schedule=zero_bubble", "model.num_hidden_layers=4"),
        *(2, 8, 2),
    ),
    "deepspeed-ep4": (("parallel.zero_stage=2", "parallel.engine=deepspeed"), 4, 8, 1),
}


SLOW = {"ep2-zero1-acc2", "experts-zero2-selective", "head-zero3", "deepspeed-ep4", "zero0", "deepspeed"}


@pytest.mark.dist
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in LAYOUTS])
def test_adapters_are_trained_as_in_one_process(name: str) -> None:
    """Seen to fail with dropout in experts numbered by a row's place among all that lie here."""
    overrides, ep_size, num_micro_batches, pp_size = LAYOUTS[name]
    worst = compare((*LORA, *overrides), ep_size, num_micro_batches, pp_size)
    assert passes(worst), worst


FROZEN = {
    "zero0": ((), 2),
    "zero0-bf16": (("train.pure_bf16=true",), 2),
    "zero3-bf16": (("train.pure_bf16=true", "parallel.zero_stage=3"), 2),
    "deepspeed": (("parallel.zero_stage=1", "parallel.engine=deepspeed"), 2),
}


def moved(overrides: tuple[str, ...], ep_size: int) -> list[str]:
    """What two steps have changed, or keep, that they must not; every adapter that they have not changed."""
    config, mesh = on_layout((*LORA, *overrides), ep_size, 4)
    trial = Trial(config, mesh)

    def hashes() -> dict[str, str]:
        held = trial.engine.held_parameters()
        return {
            name: hashlib.sha256(local(p.detach()).float().numpy().tobytes()).hexdigest() for name, p in held.items()
        }

    before = hashes()
    for step in range(2):
        trial.step(trial.share(micro_batches(4, step)), step, 1e-2)
    after, held = hashes(), trial.engine.held_parameters()
    adapters = {name for name in before if ".lora" in name}
    states = {name for name, *_ in trial.engine.named_state()}
    wrong = [f"{name} changed" for name in before if name not in adapters and before[name] != after[name]]
    wrong += [f"{name} did not change" for name in adapters if before[name] == after[name] and held[name].numel()]
    wrong += [f"{name} has a gradient" for name in before if name not in adapters and held[name].grad is not None]
    wrong += [f"{name} has state" for name in states - adapters]
    wrong += [f"{name} has a copy" for name in trial.model.masters.keys() - adapters]
    if "train.pure_bf16=true" in overrides:
        exact = {name for name in before if name not in adapters and held[name].element_size() > 2}
        wrong += [f"{name} is not in bfloat16" for name in exact if "router" not in name]
    return wrong


@pytest.mark.dist
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FROZEN])
def test_the_model_stays_bit_for_bit_and_has_no_gradients_copies_or_moments(name: str) -> None:
    assert run_ranks(moved, 4, *FROZEN[name]) == [[]] * 4


def test_a_stage_without_adapters_is_refused_on_every_rank() -> None:
    config = tiny_config(
        *LORA,
        "lora.target_modules=[up_proj]",
        "model.shared_expert_intermediate_size=0",
        "parallel.pp_size=2",
        "train.gradient_accumulation_steps=2",
        "parallel.stages=[1, 2]",
    )
    with pytest.raises(ConfigError, match="stage 0 would have nothing to train"):
        trained_by_pp_rank(config)
