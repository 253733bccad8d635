"""RMSNorm, rotary positions, SwiGLU and attention against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config import ModelConfig
from moe_dist.models.attention import build_attention
from moe_dist.models.attention_mask import Documents, masks_of
from moe_dist.models.layers import RMSNorm, SwiGLU
from moe_dist.models.precision import in_dtype
from moe_dist.models.rotary import rotary_table, rotate
from moe_dist.models.transformer import Transformer


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 7, 33)])
def test_rms_norm_formula_and_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-6).double()
    norm.weight.data.normal_()
    x = torch.randn(shape, requires_grad=True)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    (ours,) = torch.autograd.grad(norm(x).sum(), x)
    (theirs,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(norm(x), expected.float(), rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-8, 1e4, 1e15])
def test_rms_norm_is_stable(scale: float) -> None:
    norm = RMSNorm(16, 1e-6)
    x = (torch.linspace(-1, 1, 16) * scale).requires_grad_()
    out = norm(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert out.abs().max() <= 4.0  # sqrt(16), all the mass in one place


def test_rms_norm_of_bfloat16_squares_in_float32() -> None:
    """Planted: x * (x.square().mean(-1) + eps).rsqrt() in bfloat16: the mean of squares loses digits."""
    x = (torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) + 30).bfloat16()
    norm = RMSNorm(1024, 1e-6).bfloat16()
    exact = F.rms_norm(x.double(), (1024,), None, 1e-6)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), exact.bfloat16())


def test_swiglu_formula() -> None:
    torch.manual_seed(0)
    layer = SwiGLU(6, 10).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    gate, up = x @ layer.gate_proj.weight.T, x @ layer.up_proj.weight.T
    expected = (gate / (1 + (-gate).exp()) * up) @ layer.down_proj.weight.T
    torch.testing.assert_close(layer(x), expected)
    assert layer.float()(torch.full((1, 6), 1e4)).isfinite().all()


def rotary(size: int, theta: float = 10000.0) -> ModelConfig:
    return ModelConfig(head_dim=size, rope_theta=theta)


def test_rotation_is_complex_multiplication() -> None:
    positions = torch.arange(7)[None]
    x = torch.randn(1, 2, 7, 8)
    cos, sin = rotary_table(positions, rotary(8))
    ours = rotate(x, cos[:, None], sin[:, None])
    angles = positions[0].double()[:, None] * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turned = torch.complex(x[..., :4].double(), x[..., 4:].double()) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(ours.double(), torch.cat((turned.real, turned.imag), -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("theta", [1e4, 1e7])
def test_scores_depend_on_distance_only_even_far_out(theta: float) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 64)

    def score(position: int) -> Tensor:
        cos, sin = rotary_table(torch.tensor([position, position + 5]), rotary(64, theta))
        return rotate(query, cos[0], sin[0]) @ rotate(key, cos[1], sin[1])

    assert math.isclose(score(0), score(131_072), abs_tol=2e-2)
    assert math.isclose(score(0), score(4096), abs_tol=2e-3)


def test_long_positions_stay_near_float64() -> None:
    positions = torch.tensor([0, 1, 4095, 32_767, 262_143])
    cos, sin = rotary_table(positions, rotary(128, 1e6))
    angles = positions.double()[:, None] * 1e6 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert (cos[:, :64] - angles.cos()).abs().max() < 2e-2
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))


def small(**changes: object) -> ModelConfig:
    values = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4, "intermediate_size": 24}
    return ModelConfig.model_validate(values | sizes | changes)


LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10, "qk_norm": False}
KINDS: dict[str, dict[str, object]] = {
    "plain": {"qk_norm": False},
    "normed": {},
    "normed over all": {"qk_norm_per_head": False, "clip_qkv": 1.0},
    "sinks": {"attention_sinks": True, "attention_bias": True},
    "partial": {"partial_rotary_factor": 0.5, "qkv_bias": True},
    "latent": LATENT | {"num_key_value_heads": 4},
    "latent queries": LATENT | {"num_key_value_heads": 4, "q_lora_rank": 14, "rope_interleave": False},
}


@pytest.mark.parametrize("who", ["all", "documents", "one by one", "window", "one by one, window"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_attention_equals_the_plain_one(who: str, kind: str) -> None:
    """The plain one always has a mask. Seen red with a window of one more in `Documents`, with documents over the end
    of a row, and with heads of keys in another order."""
    with in_dtype(torch.float64):
        _both_agree(small(**KINDS[kind]), small(**KINDS[kind], attn_implementation="eager"), who)


def _both_agree(config: ModelConfig, eager: ModelConfig, who: str) -> None:
    torch.manual_seed(0)
    fused, plain = build_attention(config, 0), build_attention(eager, 0)
    for parameter in fused.parameters():
        parameter.data.normal_(0, 0.3)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(3, 11, 32)
    cos, sin = rotary_table(torch.arange(11)[None], config)
    window = 3 if "window" in who else None
    ids = None if who in ("all", "window") else torch.randint(0, 3, (3, 11)).sort(-1).values
    if ids is not None:
        ids[1] = ids[0, -1]  # and still another document
    outputs, gradients = [], []
    for attention, splits in ((fused, "one by one" in who), (plain, False)):
        mask = masks_of([window], 11, ids, x.device, splits)[window]
        assert isinstance(mask, Documents) == splits
        x_here = x.clone().requires_grad_()
        out = attention(x_here, (cos[:, None], sin[:, None]), mask)
        out.square().sum().backward()
        outputs.append(out)
        gradients.append([x_here.grad, *(p.grad for p in attention.parameters())])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


def test_attention_is_causal() -> None:
    """Planted: is_causal=False in `Attention.forward`."""
    torch.manual_seed(0)
    model = Transformer(small())
    model.initialize(0)
    ids = torch.randint(0, 50, (1, 9))
    changed = ids.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % 50
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents_equal_separate_ones(implementation: str) -> None:
    """Planted: document_mask without the comparison of ids (causal only)."""
    torch.manual_seed(0)
    model = Transformer(small(attn_implementation=implementation))
    model.initialize(0)
    documents = [torch.randint(0, 50, (1, length)) for length in (5, 1, 8)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    ids = torch.cat([torch.full_like(document, index) for index, document in enumerate(documents)], 1)
    packed = model(torch.cat(documents, 1), position_ids=positions, document_ids=ids)
    separate = torch.cat([model(document) for document in documents], 1)
    torch.testing.assert_close(packed, separate)


def test_too_long_a_sequence_is_named() -> None:
    model = Transformer(small(max_position_embeddings=8))
    with pytest.raises(ValueError, match="sequence of 9 tokens: at most max_position_embeddings=8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
