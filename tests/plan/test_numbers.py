"""What a plan counts, held against published numbers and against what tensors and the allocator say here."""

from __future__ import annotations

from typing import Any

import pytest
from allocator import measured_step
from patches import Replace

from moe_dist.config import Config, ModelConfig, load_config
from moe_dist.models import counts
from moe_dist.models.counts import flops_per_token
from moe_dist.parallel import state_bytes as state
from moe_dist.parallel.engines.replicated import ReplicatedEngine
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Mesh
from moe_dist.plan import timing
from moe_dist.plan.cluster import cluster_of
from moe_dist.plan.search import estimate
from moe_dist.train.build import build_model

DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_experts=256,
    num_experts_per_tok=8,
    mlp_only_layers=[0, 1, 2],
    shared_expert_intermediate_size=2048,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_norm=False,
    scoring_func="sigmoid",
    n_group=8,
    topk_group=4,
)
# GFLOP of training for one token of 4096, causal.
PUBLISHED = {"qwen3_235b_a22b": 148.3, "qwen3_30b_a3b": 23.1, "mixtral_8x7b": 79.7, "mixtral_8x22b": 242.2}


def model_of(name: str) -> ModelConfig:
    return DEEPSEEK_V3 if name == "deepseek_v3" else load_config(f"configs/{name}.yaml").model


def assert_published_flops() -> None:
    for name, gflops in {**PUBLISHED, "deepseek_v3": 250.4}.items():
        found = flops_per_token(model_of(name), 4096, causal=True) / 1e9
        assert found == pytest.approx(gflops, rel=0.01), (name, found)


def test_floating_point_operations_are_those_that_were_published() -> None:
    assert_published_flops()


def test_miscounted_key_value_heads_are_seen(replace: Replace) -> None:
    """As many as query heads: Qwen3-235B's attention would have 16 times its keys and values."""
    right = counts.block_shapes

    def wrong(model: ModelConfig, has_experts: bool) -> Any:
        return right(model.model_copy(update={"num_key_value_heads": model.num_attention_heads}), has_experts)

    replace(counts, "block_shapes", wrong)
    with pytest.raises(AssertionError):
        assert_published_flops()


MODEL = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 96,
    "intermediate_size": 256,
    "num_experts": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "experts": {},
    "dense": {"num_experts": 0},
    "shared": {"shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
}


def small(kind: str, precision: str = "float32", recompute: str = "none", **data: Any) -> Config:
    train: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_checkpointing": recompute}
    train |= {} if precision == "float32" else {precision: True}
    return Config.model_validate({"model": MODEL | KINDS[kind], "data": {"max_seq_length": 128} | data, "train": train})


@pytest.mark.parametrize("precision", ["float32", "bf16", "pure_bf16"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_peak_is_what_the_allocator_measures(kind: str, precision: str) -> None:
    """Within 10 %, with each kind of recomputation. Seen to fail with the copies that autocast keeps of weights left
    out of `block_activations`, and with one gradient of logits instead of two in `head_activations`."""
    for recompute in ("none", "selective", "full"):
        config = small(kind, precision, recompute)
        kept, peak = measured_step(config)
        planned = estimate(config, 1, cluster_of("cpu")).memory
        wanted = planned.total - planned.weights - planned.gradients - planned.optimizer
        assert wanted == pytest.approx(peak, rel=0.1), (recompute, kept, peak, planned)


@pytest.mark.parametrize("more", [{}, {"pure_bf16": True}])
def test_state_is_what_one_process_holds(more: dict[str, Any], replace: Replace) -> None:
    """To the byte. Ranks: tests/parallel/engines/test_state_bytes.py weighs them by the same formulas.

    The wrong term: masters of bfloat16 weights left out.
    """
    config = Config.model_validate({"model": MODEL, "train": more})
    engine = ReplicatedEngine(build_model(config, Mesh.single()), config, Mesh.single())
    held = engine.held_bytes()
    assert estimate(config, 1, cluster_of("cpu")).memory.optimizer == held.optimizer
    found = state.state_bytes(config, Layout(1))[0]
    assert (found.weights, found.gradients) == (held.weights, held.gradients)
    if more:
        replace(state, "moments", lambda optimizer: 1)  # as without masters: 2 numbers of 4 bytes, not 3
        assert estimate(config, 1, cluster_of("cpu")).memory.optimizer != held.optimizer


def test_a_skewed_layer_takes_longer_and_more(replace: Replace) -> None:
    """The wrong term: imbalance left out of the time."""
    config = load_config("configs/mixtral_8x7b.yaml")
    cluster = cluster_of("h100")
    even, skewed = (estimate(config, 64, cluster, imbalance) for imbalance in (1.0, 2.0))
    assert skewed.memory.total > even.memory.total
    assert skewed.time.imbalance > 0 == even.time.imbalance
    assert skewed.time.dispatch > even.time.dispatch
    replace(timing, "rank_load", lambda model, ep_size, imbalance: 1.0)
    assert estimate(config, 64, cluster, 2.0).time.total == pytest.approx(even.time.total)
