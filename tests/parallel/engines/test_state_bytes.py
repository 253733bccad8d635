"""What a rank holds between steps, weighed on the real tensors, is what the formulas of docs/parallelism.md say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import mesh_of, micro_batches, tiny_config
from torch import Tensor

from moe_dist.config import Config
from moe_dist.parallel.engines.deepspeed import DeepSpeedEngine
from moe_dist.parallel.engines.optimizer import local
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.state_bytes import state_bytes
from moe_dist.verify.trial import Trial

# Wide enough that what FSDP pads (a matrix of 3 rows over 4 ranks has 4) is not what is weighed.
WIDE = ("model.hidden_size=64", "model.moe_intermediate_size=64", "model.num_experts=16", "model.intermediate_size=128")


def weigh(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind them, each once: a view of a whole tensor weighs as much as the whole."""
    storages = {s.data_ptr(): s.nbytes() for s in (local(t.detach()).untyped_storage() for t in tensors)}
    return sum(storages.values())


def weighed(asked: list[tuple[str, ...]]) -> list[tuple[int, int, int]]:
    """(weights, gradients, optimizer) of this rank after a step, for every set of overrides."""
    return [_weighed(tiny_config(*WIDE, *overrides)) for overrides in asked]


def _weighed(config: Config) -> tuple[int, int, int]:
    parallel = config.parallel
    parts = Trial(config, mesh_of(parallel.ep_size, parallel.shard_size, parallel.pp_size))
    engine = parts.engine if isinstance(parts.engine, DeepSpeedEngine) else None
    norm, gradients = parts.engine.norm, []

    def watched() -> Tensor:
        """Gradients are weighed once they are reduced: DeepSpeed, which keeps them in its buckets, frees them later."""
        buckets = sum(part.nbytes for part in engine.partitions) if engine else 0
        held = [p.grad for p in parts.model.parameters() if p.grad is not None]
        gradients.append(buckets + weigh(held if engine else [*held, *parts.engine.views.values()]))
        return norm()

    # Were it never called, there would be no gradients[0].
    parts.engine.norm = watched
    count = config.train.gradient_accumulation_steps * parts.mesh.layout.dp_size
    parts.step(parts.share(micro_batches(count)), 0, 1e-2)
    weights = weigh(list(parts.model.parameters()))
    if engine:
        zero = engine.zero_optimizer
        state = [t for group in zero.optimizer.state.values() for t in group.values() if t.ndim]
        return weights, gradients[0], weigh([*state, *zero.single_partition_of_fp32_groups])
    state = [t for _, _, tensors, _ in parts.engine.named_state() for t in tensors if t.ndim]
    return weights, gradients[0], weigh([*state, *parts.model.masters.values()])


SHARDED = [(f"parallel.zero_stage={z}", f"parallel.ep_size={e}") for z in range(4) for e in (1, 2, 4)]
HYBRID = [(*SHARDED[index], "parallel.shard_size=2") for index in (9, 10, 11)]
PIPELINE = [
    ("parallel.pp_size=2", f"parallel.zero_stage={z}", "parallel.ep_size=2", "train.gradient_accumulation_steps=2")
    for z in (0, 1, 3)
]
OTHERS = [("train.pure_bf16=true",), ("optimizer.optim=sgd", "optimizer.momentum=0.9"), ("optimizer.optim=sgd",)]
DEEPSPEED = [(*SHARDED[3 * z + i], "parallel.engine=deepspeed") for z in (1, 2) for i in (0, 1, 2)]

LORA = ("balance.bias_update_rate=0", "lora.r=16", "lora.target_modules=all-linear")
ADAPTERS = [(*LORA, *SHARDED[index]) for index in (2, 4, 10)]
ADAPTERS += [(*LORA, *PIPELINE[2]), (*LORA, *DEEPSPEED[1]), (*LORA, "train.pure_bf16=true", *SHARDED[10])]
FROZEN = ("balance.bias_update_rate=0", "train.train_only=[experts:1,4,11-12, layers:1]")
IN_PART = [(*FROZEN, *SHARDED[index]) for index in (2, 4, 10)]
IN_PART += [(*FROZEN, "train.pure_bf16=true"), ("train.freeze=[embed_tokens, experts]", *DEEPSPEED[1])]


@pytest.mark.dist
@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(SHARDED, id="zero_stage x ep"),
        pytest.param(HYBRID + PIPELINE + OTHERS, id="hybrid, pipeline, precision"),
        pytest.param(DEEPSPEED, id="deepspeed"),
        pytest.param(ADAPTERS, id="adapters"),
        pytest.param(IN_PART, id="frozen"),
    ],
)
def test_ranks_hold_what_the_formulas_say(asked: list[tuple[str, ...]]) -> None:
    """Within 5 %, each of weights, gradients and optimizer state, on every rank.

    Seen to fail with parameters left gathered after backward (`set_reshard_after_backward(False)`).
    """
    found = run_ranks(weighed, 4, asked)
    for index, overrides in enumerate(asked):
        config = tiny_config(*WIDE, *overrides)
        layout = Layout.of(config, 4)
        wanted = state_bytes(config, layout)
        for rank in range(4):
            place = wanted[layout.coordinates(rank)[0]]
            expected = (place.weights, place.gradients, place.optimizer)
            assert found[rank][index] == pytest.approx(expected, rel=0.05), (overrides, rank)


def per_rank_bytes(**parallel: Any) -> int:
    config = Config.model_validate({"model": {"num_experts": 16}, "parallel": parallel})
    return state_bytes(config, Layout.of(config, 16))[0].total


def test_more_sharding_is_never_more_bytes() -> None:
    """On 16 ranks, with and without experts shared out; sharded over all, every ep_size costs the same."""
    for ep_size in (1, 2, 4, 8, 16):
        by_stage = [per_rank_bytes(zero_stage=stage, ep_size=ep_size) for stage in range(4)]
        hybrid = per_rank_bytes(zero_stage=3, ep_size=ep_size, shard_size=4)
        assert by_stage[0] > hybrid > by_stage[1] == by_stage[2] == by_stage[3] == per_rank_bytes(zero_stage=1)
    assert torch.float32.itemsize == 4
