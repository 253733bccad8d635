"""Experts elsewhere: the same tokens, never more of them here than there is room for, and who leaves first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import EVERY

from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.generate.expert_cache import ExpertCache
from moe_dist.generate.options import SamplingOptions
from moe_dist.models.experts import Experts
from moe_dist.models.transformer import Transformer

PROMPTS = [[1, 2, 3], list(range(40))]


def model_of(name: str) -> Transformer:
    model = Transformer(EVERY[name].model_copy(update={"initializer_range": 0.2}))
    model.initialize(seed=3)
    return model


def one_expert(model: Transformer) -> int:
    experts = next(model.moe_layers()).experts
    assert isinstance(experts, Experts)
    return sum(stack[0].nbytes for stack in experts.parameters())


@pytest.mark.parametrize("how", [{}, {"cache_policy": "lfu", "expert_folder": True}, {"prefetch": True}])
@pytest.mark.parametrize("name", ["qwen3_moe-0", "gpt_oss-0", "qwen3_moe-4"])
def test_the_same_tokens_with_room_for_eight_experts(name: str, how: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(name)
    expected = MoEInferenceEngine(model).generate(PROMPTS, SamplingOptions(10))
    room = 8 * one_expert(model)
    options = how | ({"expert_folder": str(tmp_path)} if "expert_folder" in how else {})
    engine = MoEInferenceEngine(model, expert_cache_size_gb=room / 2**30, **options)
    cache = engine.expert_cache
    assert cache is not None
    seen = []
    keep = cache._keep
    cache._keep = lambda key, weights: (keep(key, weights), seen.append(cache._bytes))  # type: ignore[method-assign]
    assert [a.tokens for a in engine.generate(PROMPTS, SamplingOptions(10))] == [a.tokens for a in expected]
    assert max(seen) == room
    stats = engine.expert_cache_stats
    assert stats is not None
    assert stats.hits
    assert stats.misses
    assert (stats.prefetched > 0) == how.get("prefetch", False)
    assert stats.bytes_loaded == (stats.misses + stats.prefetched) * one_expert(model_of(name))
    assert all(parameter.is_meta for moe in model.moe_layers() for parameter in moe.experts.parameters())


def order_of(policy: Any, uses: list[int]) -> list[int]:
    """Which experts of layer 0 are here after these uses, with room for three."""
    model = model_of("qwen3_moe-0")
    cache = ExpertCache(model, 3 * one_expert(model), policy)
    for expert in uses:
        cache.get((0, expert))
    return sorted(expert for _, expert in cache._here)


def test_who_leaves_first() -> None:
    uses = [0, 0, 1, 1, 1, 2, 3]
    assert order_of("lru", uses) == [1, 2, 3]  # 0 was used longest ago
    assert order_of("lfu", uses) == [0, 1, 3]  # 2 was used once
    with pytest.raises(ValueError, match="lru or lfu"):
        order_of("fifo", [])


def test_what_it_has_is_the_expert(tmp_path: Path) -> None:
    model = model_of("qwen3_moe-0")
    experts = next(model.moe_layers()).experts
    expected = experts.w_down.detach().clone()
    cache = ExpertCache(model, 3 * one_expert(model), folder=tmp_path)
    for expert in (4, 0, 4):
        assert torch.equal(cache.get((0, expert))["w_down"][0], expected[expert])
