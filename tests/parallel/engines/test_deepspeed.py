"""The DeepSpeed engine computes what one process computes: ep x ZeRO stage, accumulation, offload, options.

What DeepSpeed does by default, or would do without our groups, is planted by `tests/verify` and turns the comparison
red; what a rank holds is weighed in `test_state_bytes.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace

import parity
import pytest
import torch
import torch.distributed as dist
from parity import TOLERANCE
from ranks import run_ranks
from tiny import mesh_of, micro_batches, tiny_config

from moe_dist.config import ConfigError
from moe_dist.models.experts import Expert
from moe_dist.parallel.mesh import Mesh
from moe_dist.verify.trial import Trial, difference

pytestmark = pytest.mark.dist


def compare(overrides: tuple[str, ...], ep_size: int, num_micro_batches: int, *engine: str) -> dict[str, float]:
    """Largest deviations of DeepSpeed on four ranks from our own engine in one process."""
    return parity.compare((*overrides, "parallel.engine=deepspeed", *engine), ep_size, num_micro_batches)


@pytest.mark.parametrize("num_micro_batches", [4, 8], ids=["plain", "accumulated"])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_stages_agree_with_one_process(zero_stage: int, ep_size: int, num_micro_batches: int) -> None:
    """Seen to fail for stage 1, accumulated, while DeepSpeed counted our steps as micro-batches: every second call did
    not update.
    """
    worst = compare((), ep_size, num_micro_batches, f"parallel.zero_stage={zero_stage}")
    assert worst["initial"] == 0.0
    assert max(worst.values()) < TOLERANCE, worst


def test_own_stacked_experts_agree() -> None:
    """With stacked vectors, which do not decay. Seen to fail where `ndim` decided."""
    worst = compare(("model.expert=stacked:WithVectors", "optimizer.weight_decay=1.0"), 2, 8, "parallel.zero_stage=1")
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_offloaded_optimizers_agree(zero_stage: int, ep_size: int) -> None:
    """Gradients take another way through DeepSpeed: partitions of weights, gradients and state in host memory."""
    worst = compare((), ep_size, 8, f"parallel.zero_stage={zero_stage}", "parallel.offload_optimizer=cpu")
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.optim=sgd", "optimizer.momentum=0.9"),
        ("train.gradient_checkpointing=full",),
        ("train.gradient_checkpointing=selective", "balance.aux_loss_scope=global_batch"),
        ("model.expert=swiglu_loop", "model.tie_word_embeddings=true"),
        ("balance.freeze_router=true", "train.label_smoothing_factor=0.1"),
        ("balance.capacity_factor=0.8", "balance.router_jitter=0.1"),
        ("train.max_grad_norm=1000", "train.deterministic=true"),
    ],
    ids=lambda overrides: "+".join(item.split(".")[1] for item in overrides),
)
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_options_agree(zero_stage: int, overrides: tuple[str, ...]) -> None:
    worst = compare(overrides, 2, 8, f"parallel.zero_stage={zero_stage}")
    assert max(worst.values()) < TOLERANCE, worst


TUNED = {"zero_optimization": {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "overlap_comm": True}}
RANK_BY_RANK = {"zero_optimization": {"reduce_bucket_size": 3000, "use_multi_rank_bucket_allreduce": False}}


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [TUNED, RANK_BY_RANK], ids=["small buckets", "rank by rank"])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_tuning_by_a_file_of_ones_own_changes_nothing(zero_stage: int, tuning: dict) -> None:
    """Buckets smaller than most parameters, reductions beside backward, one reduction per owner."""
    worst = compare((), 2, 8, f"parallel.zero_stage={zero_stage}", f"parallel.deepspeed_config={json.dumps(tuning)}")
    assert max(worst.values()) < TOLERANCE, worst


class Skipping(Expert):
    """A person's own expert that does nothing without rows: it then has no gradient at all."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.up = torch.nn.Linear(hidden_size, intermediate_size)
        self.down = torch.nn.Linear(intermediate_size, hidden_size)

    def forward(self, x_RD: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x_RD).relu()) if len(x_RD) else x_RD


def losses_and_norms(overrides: tuple[str, ...]) -> list[float]:
    config = tiny_config(*overrides)
    parts = Trial(config, mesh_of(config.parallel.ep_size))
    told = []
    for step in range(3):
        mine = micro_batches(4, step)[parts.mesh.dp_rank :: parts.mesh.layout.dp_size]
        result = parts.step(mine, step, 1e-2)
        told += [result.loss, result.grad_norm]
        parts.balancer.clear()
    return told


@pytest.mark.parametrize("ep_size", [1, 2])
def test_experts_without_gradient_on_some_ranks(ep_size: int) -> None:
    """64 experts for a handful of tokens: ranks still reduce the same parameters, as with the torch engine.

    Seen to fail without the zeros of `DeepSpeedEngine.reduce`.
    """
    own = ("model.expert=test_deepspeed:Skipping", "model.num_experts=64")
    wanted = run_ranks(losses_and_norms, 4, (*own, f"parallel.ep_size={ep_size}"))[0]
    for found in run_ranks(losses_and_norms, 4, (*own, *options(1, ep_size))):
        assert found == pytest.approx(wanted, rel=TOLERANCE)


def options(zero_stage: int, ep_size: int, *more: str) -> tuple[str, ...]:
    return ("parallel.engine=deepspeed", f"parallel.zero_stage={zero_stage}", f"parallel.ep_size={ep_size}", *more)


def with_a_bad_step(where: str, overrides: tuple[str, ...]) -> tuple[bool, bool, float]:
    """A step, a poisoned one, two more: (skipped, nothing moved in it, deviation from a run without it)."""
    config = tiny_config(*overrides)
    mesh = mesh_of(config.parallel.ep_size)

    def run(with_poison: bool) -> tuple[bool, bool, dict[str, torch.Tensor]]:
        parts, skipped, still = Trial(config, mesh), True, True
        for step in range(3):
            mine = micro_batches(8, step)[mesh.dp_rank :: mesh.layout.dp_size]
            if step == 1 and with_poison:
                before, hook = parts.weights, None
                if dist.get_rank() == 1 and where == "gradient":
                    parameter = list(parts.model.parameters())[3]
                    hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
                elif dist.get_rank() == 1:
                    hook = parts.model.lm_head.register_forward_hook(lambda *args: args[2] * float("inf"))
                skipped = parts.step([replace(batch) for batch in mine], step, 1e-2).skipped
                still = all(torch.equal(before[name], value) for name, value in parts.weights.items())
                if hook is not None:
                    hook.remove()
                parts.balancer.clear()
            parts.step(mine, step, 1e-2)
            parts.balancer.clear()
        return skipped, still, parts.weights

    skipped, still, found = run(True)
    return skipped, still, difference(found, run(False)[2])


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_all_ranks_agree_on_a_bad_step(zero_stage: int, where: str, offload: str) -> None:
    """A NaN on one rank: every rank skips, nothing moves, and nothing of it is left for the steps after."""
    overrides = options(zero_stage, 2, f"parallel.offload_optimizer={offload}")
    for skipped, still, deviation in run_ranks(with_a_bad_step, 4, where, overrides):
        assert (skipped, still, deviation) == (True, True, 0.0)


def first_gradients(overrides: tuple[str, ...]) -> dict[str, torch.Tensor]:
    config = tiny_config(*overrides)
    parts = Trial(config, mesh_of(config.parallel.ep_size))
    with parts.unclipped() as gradients:
        parts.step(parts.share(micro_batches(8)), 0, 1e-2)
    return gradients


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_autocast_gives_the_gradients_of_the_torch_engine(zero_stage: int) -> None:
    """bf16 computes the same on each rank whatever the engine; sums stay in float32."""
    wanted = run_ranks(first_gradients, 4, ("parallel.ep_size=2", "train.bf16=true"))[0]
    for found in run_ranks(first_gradients, 4, options(zero_stage, 2, "train.bf16=true"))[:1]:
        assert difference(found, wanted) < TOLERANCE


def test_two_runs_are_bitwise_equal() -> None:
    once, again = (run_ranks(parity.told, 4, options(2, 2), 2, 8) for _ in range(2))
    for first, second in zip(once, again, strict=True):
        assert first.norms == second.norms
        assert all(torch.equal(first.weights[name], value) for name, value in second.weights.items())


def test_one_process_is_told_what_to_do() -> None:
    with pytest.raises(ConfigError, match="deepspeed: needs two ranks or more"):
        Trial(tiny_config(*options(1, 1)), Mesh.single())


def without_the_package() -> str:
    import sys
    from unittest.mock import patch

    with patch.dict(sys.modules, {"deepspeed": None}), pytest.raises(ConfigError) as caught:
        Trial(tiny_config(*options(1, 2)), mesh_of(2))
    return str(caught.value)


def test_a_missing_package_is_one_line() -> None:
    assert all("pip install 'moe-dist[deepspeed]'" in message for message in run_ranks(without_the_package, 4))
