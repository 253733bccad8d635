"""int8 weights: what is rounded and how far, the same arithmetic as with weights made whole, and what it saves."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import EVERY
from patches import Replace
from torch import Tensor

from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.generate.options import SamplingOptions
from moe_dist.models import int8
from moe_dist.models.experts import Experts
from moe_dist.models.grouped import StackedLowRank
from moe_dist.models.int8 import Int8Experts, Int8Linear, to_int8
from moe_dist.models.layers import Linear
from moe_dist.models.transformer import Transformer

FAMILIES = ("qwen3_moe-0", "qwen2_moe-0", "deepseek_v3-0", "gpt_oss-0")
"""With a shared expert, latents, and biases of experts."""
IDS = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(1))
PROMPTS = [[1, 2, 3], list(range(40))]


def model_of(name: str, **changes: Any) -> Transformer:
    model = Transformer(EVERY[name].model_copy(update={"initializer_range": 0.2} | changes))
    model.initialize(seed=3)
    return model.eval().requires_grad_(False)


def whole_again(model: Transformer, narrow: Transformer) -> Transformer:
    """`model` with the weights that `narrow` stands for."""
    for name, module in model.named_modules():
        mine = narrow.get_submodule(name)
        if isinstance(mine, Int8Linear):
            assert isinstance(module, Linear)
            module.weight.copy_(mine.weight.float() * mine.scale[:, None])
        if isinstance(mine, Int8Experts):
            for stack in ("w_gate_up", "w_down"):
                getattr(module, stack).copy_(getattr(mine, stack).float() * getattr(mine, f"{stack}_scale"))
    return model


def off(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_is_within_half_a_step_and_computes_as_one_made_whole(name: str) -> None:
    model = model_of(name)
    right = model(IDS)
    narrow = deepcopy(model)
    to_int8(narrow)
    assert not any(type(module) is Linear or isinstance(module, Experts) for module in narrow.modules())
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    again = whole_again(model, narrow)
    rounded = 0
    for key, parameter in again.named_parameters():
        if not torch.equal(parameter, before[key]):
            inputs = 1 if parameter.ndim == 2 else -2
            step = before[key].abs().amax(inputs, keepdim=True) / 127
            assert ((parameter - before[key]).abs() <= 0.501 * step).all(), key
            rounded += 1
    assert rounded == sum(parameter.ndim >= 2 for key, parameter in again.named_parameters() if _is_rounded(key))
    assert off(narrow(IDS), again(IDS)) < 1e-5
    assert off(narrow(IDS), right) < 0.2  # random weights: tokens at a border go to other experts


def _is_rounded(key: str) -> bool:
    return not any(part in key for part in ("embed", "lm_head", "router", "norm", "b_gate_up", "b_down", "sink"))


def test_a_wrong_scale_is_seen(replace: Replace) -> None:
    """Planted: scales of inputs in the place of outputs."""
    replace(int8, "quantized", lambda weight, inputs: _by_inputs(weight, inputs))
    with pytest.raises(AssertionError):
        test_every_matrix_is_within_half_a_step_and_computes_as_one_made_whole("qwen3_moe-0")


def _by_inputs(weight: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(inputs, keepdim=True) / 60  # 127 of them are out of reach
    return (weight / scale).round().clamp(-50, 50).to(torch.int8), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_take_a_quarter_and_scales(dtype: torch.dtype) -> None:
    model = model_of("qwen3_moe-0", hidden_size=128, moe_intermediate_size=128)
    if dtype == torch.bfloat16:
        model.round_weights(dtype)
        model.masters.clear()
    embedding = 2 * model.config.vocab_size * 128 * dtype.itemsize
    before, after = to_int8(model)
    assert (after - embedding) / (before - embedding) < (0.29 if dtype == torch.float32 else 0.57)
    assert model(IDS).dtype == dtype
    assert torch.isfinite(model(IDS)).all()


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe-0", "gpt_oss-0"])
def test_an_expert_cache_holds_more_of_them_and_says_the_same(name: str, folder: bool, tmp_path: Path) -> None:
    """In the room that eight experts had, and their biases and scales count."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64}
    model = model_of(name, **sizes)
    experts = next(model.moe_layers()).experts
    assert isinstance(experts, Experts)
    room = 8 * sum(stack[0].nbytes for stack in experts.parameters()) / 2**30
    to_int8(model)
    expected = [a.tokens for a in MoEInferenceEngine(model).generate(PROMPTS, SamplingOptions(10))]
    how: dict[str, Any] = {"expert_folder": str(tmp_path)} if folder else {}
    found: dict[str, tuple[int, float]] = {}
    for kind in ("float", "int8"):
        one = model if kind == "int8" else model_of(name, **sizes)
        engine = MoEInferenceEngine(one, expert_cache_size_gb=room, **how)
        said = [a.tokens for a in engine.generate(PROMPTS, SamplingOptions(10))]
        assert kind == "float" or said == expected
        assert engine.expert_cache is not None
        assert engine.expert_cache_stats is not None
        found[kind] = len(engine.expert_cache._here), engine.expert_cache_stats.hit_rate
    assert found["float"][0] == 8
    assert found["int8"][0] >= min(3.4 * 8, sum(moe.num_experts for moe in model.moe_layers()))
    assert found["int8"][1] > found["float"][1]


def test_experts_that_are_no_stack_or_adapted_are_refused() -> None:
    model = model_of("qwen3_moe-0")
    experts = next(model.moe_layers()).experts
    assert isinstance(experts, Experts)
    experts.lora_down = StackedLowRank(6, 12, 16, 2, 1.0, 0.0)
    with pytest.raises(ValueError, match="adapters beside them; moe-dist export --merge"):
        to_int8(model)
    experts.lora_down = None
    to_int8(model)
    with pytest.raises(ValueError, match="Int8Experts are not one stack"):
        to_int8(model)
