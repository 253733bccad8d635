"""Experts in float8: how numbers are rounded, products and gradients against float64, and what training makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patches import Replace
from tiny import micro_batches, tiny_config
from torch import Tensor

from moe_dist.config import ConfigError, load_mapping
from moe_dist.models import float8, swiglu
from moe_dist.models.experts import Experts
from moe_dist.models.float8 import LARGEST, multiply_in_float8, rounded
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.run_summary import warnings_of
from moe_dist.verify.trial import Trial

COUNTS = [5, 0, 9, 3]
ENDS = torch.tensor(COUNTS).cumsum(0).to(torch.int32)


def specification(numbers: Tensor, summed: int) -> Tensor:
    """What is left of numbers: four significant bits, fewer below 2^-6, the largest 448, by simple arithmetic."""
    scale = numbers.abs().amax(summed, keepdim=True) / 448
    scaled = numbers / scale.where(scale > 0, 1.0)
    _, exponent = scaled.frexp()
    step = 2.0 ** (exponent.clamp(min=-5) - 4).to(numbers.dtype)
    return (scaled / step).round() * step * scale


def times(rows: Tensor, weights: Tensor) -> Tensor:
    """Both rounded, expert by expert; in float64 but for scales, by which a number may be in the middle of two."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    chunks, stack = specification(rows.to(wide), 1).double().split(COUNTS), specification(weights.to(wide), 1).double()
    return torch.cat([x @ weight for x, weight in zip(chunks, stack, strict=True)])


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers of very different sizes."""
    return (torch.randn(*shape, dtype=torch.float64) * torch.randn(*shape, dtype=torch.float64).exp()).to(dtype)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("summed", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_largest_of_what_is_summed_is_the_largest_of_float8(dtype: torch.dtype, summed: int) -> None:
    """And each number is within half of the last of its four bits, or of the smallest there is."""
    numbers = draw(3, 40, 24, dtype=dtype)
    numbers[1] *= 1e-6
    found, wide = rounded(numbers, summed), torch.promote_types(dtype, torch.float32)
    assert (found.codes.dtype, found.codes.shape) == (torch.float8_e4m3fn, numbers.shape)
    assert torch.equal(found.scale, numbers.to(wide).abs().amax(summed, keepdim=True) / LARGEST)
    assert found.codes.to(wide).abs().amax(summed).eq(448).all()
    error = (found.whole().double() - numbers.double()).abs()
    assert (error <= (numbers.double().abs() / 16).clamp(min=found.scale.double() / 1024) * (1 + 1e-6)).all()
    wanted = specification(numbers.to(wide), summed)
    assert (found.whole() - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_numbers_that_float8_does_not_like(dtype: torch.dtype) -> None:
    """Zeros, the smallest and the largest of their type; what is not finite is NaN, in its own row alone."""
    info = torch.finfo(dtype)
    rows = torch.ones(6, 4, dtype=dtype)
    rows[0], rows[1], rows[2, 0], rows[3] = 0.0, info.smallest_normal, info.max / 2, -info.max / 4
    rows[4, 0], rows[5, 0] = float("inf"), float("nan")
    whole = rounded(rows, 1).whole()
    assert whole[0].eq(0).all()
    assert (whole[1] / rows[1] - 1).abs().max() <= 1 / 16
    torch.testing.assert_close(whole[2:4, 0].to(dtype), rows[2:4, 0])
    assert whole[2, 1:].eq(0).all()
    assert whole[3].isfinite().all()
    assert whole[4:].isnan().all()


@pytest.mark.parametrize("sizes", [(32, 48), (5, 3), (24, 16)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str
)
def test_products_are_those_of_rounded_numbers(dtype: torch.dtype, tolerance: float, sizes: tuple[int, int]) -> None:
    """By the kernel for float32, or expert by expert where it has not the sizes; and under autocast as without."""
    rows, weights = draw(sum(COUNTS), sizes[0], dtype=dtype), draw(len(COUNTS), *sizes, dtype=dtype)
    found = multiply_in_float8(rows, weights, ENDS)
    wanted = times(rows, weights)
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() <= tolerance * wanted.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(multiply_in_float8(rows, weights, ENDS), found)


def test_what_rounding_does_to_a_product() -> None:
    """Of normal numbers less than half of the last bit of one operand, 2^-4, though both are rounded."""
    rows, weights = torch.randn(sum(COUNTS), 256), torch.randn(len(COUNTS), 256, 64)
    exact = torch.cat([x @ weight for x, weight in zip(rows.split(COUNTS), weights, strict=True)])
    error = (multiply_in_float8(rows, weights, ENDS) - exact).norm() / exact.norm()
    assert 2**-6 < error < 2**-4


def stack(dtype: torch.dtype, precision: str = "fp8", chunk_rows: int = 0, width: int = 24) -> Experts:
    experts = Experts(len(COUNTS), 32, width)
    experts.initialize(lambda expert: expert, 0.3)
    experts = experts.to(dtype)
    experts.precision, experts.chunk_rows = precision, chunk_rows
    return experts


def gradients(experts: Experts, rows: Tensor, upstream: Tensor) -> list[Tensor]:
    """The output, and gradients of rows and weights."""
    rows = rows.clone().requires_grad_()
    out = experts(rows, torch.tensor(COUNTS))
    return [out.detach(), *torch.autograd.grad(out, (rows, *experts.parameters()), upstream)]


@pytest.mark.parametrize("width", [24, 5])
@pytest.mark.parametrize("chunk_rows", [0, 7])
def test_forward_and_backward_are_those_of_rounded_numbers(chunk_rows: int, width: int) -> None:
    """In float64, where no rounding before moves what is rounded after: every product of rows with weights has both
    rounded, gradients of weights neither; an expert without rows has zeros. Planted: weights of backward rounded along
    what forward sums; the gradient of `w_down` from rounded rows."""
    experts = stack(torch.float64, chunk_rows=chunk_rows, width=width)
    w_gate_up, w_down = experts.w_gate_up.detach(), experts.w_down.detach()
    rows, upstream = torch.randn(2, sum(COUNTS), 32, dtype=torch.float64)
    gate, up = times(rows, w_gate_up).chunk(2, dim=1)
    gate.requires_grad_(), up.requires_grad_()
    hidden = F.silu(gate) * up
    grad_hidden = times(upstream, w_down.transpose(1, 2))
    grad_gate_up = torch.cat(torch.autograd.grad(hidden, (gate, up), grad_hidden), dim=1)

    def summed(left: Tensor, right: Tensor) -> Tensor:
        return torch.stack([a.t() @ b for a, b in zip(left.split(COUNTS), right.split(COUNTS), strict=True)])

    hidden = hidden.detach()
    wanted = [times(hidden, w_down), times(grad_gate_up, w_gate_up.transpose(1, 2))]
    wanted += [summed(rows, grad_gate_up), summed(hidden, upstream)]
    for mine, theirs in zip(gradients(experts, rows, upstream), wanted, strict=True):
        assert (mine - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_weights_are_those_of_rows_as_they_are(dtype: torch.dtype) -> None:
    """To the bit what the plain path makes of the same rows and the same gradients."""
    experts = stack(dtype)
    rows, upstream = torch.randn(2, sum(COUNTS), 32).to(dtype)
    out, _, _, d_down = gradients(experts, rows, upstream)
    hidden = swiglu.swiglu(multiply_in_float8(rows, experts.w_gate_up.detach(), ENDS))
    assert torch.equal(d_down, torch.nn.functional.grouped_mm(hidden.t(), upstream, offs=ENDS))
    assert torch.equal(out, multiply_in_float8(hidden, experts.w_down.detach(), ENDS))


def test_without_rows_gradients_are_zeros() -> None:
    experts = stack(torch.float32)
    rows = torch.zeros(0, 32, requires_grad=True)
    experts(rows, torch.zeros(len(COUNTS), dtype=torch.int64)).sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in experts.parameters())


def test_what_the_kernel_is_given(replace: Replace) -> None:
    """Without a GPU: the layouts are those that torch's own check for an older name of the kernel accepts, and the
    numbers are the rounded ones."""

    def stand_in(
        codes: Tensor,
        columns: Tensor,
        scale_a: Tensor,
        by_a: Any,
        scale_b: Tensor,
        by_b: Any,
        *swizzles: Any,
        offs: Tensor,
    ) -> Tensor:
        assert by_a == by_b == F.ScalingType.RowWise
        assert swizzles == (F.SwizzleType.NO_SWIZZLE,) * 2
        given = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
            for t in (codes, columns, scale_a, scale_b, offs)
        ]
        like = torch._scaled_grouped_mm(*given[:4], offs=given[4], out_dtype=torch.bfloat16)
        rows = codes.float() * scale_a[:, None]
        weights = columns.float() * scale_b[:, None, :]
        out = torch.cat([x @ weight for x, weight in zip(rows.split(COUNTS), weights, strict=True)]).bfloat16()
        assert out.shape == like.shape
        return out

    rows, weights = torch.randn(sum(COUNTS), 32).bfloat16(), torch.randn(len(COUNTS), 48, 32).bfloat16()
    both = ((rows, weights.transpose(1, 2)), (torch.randn(sum(COUNTS), 48).bfloat16(), weights))
    emulated = [multiply_in_float8(*one, ENDS) for one in both]
    replace(float8, "kernel_takes", lambda rows_RX, weights: True)
    replace(float8, "scaled_grouped_mm", stand_in)
    for one, wanted in zip(both, emulated, strict=True):
        found = multiply_in_float8(*one, ENDS)
        assert (found.float() - wanted.float()).norm() <= 1e-3 * wanted.float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("counts", [[16, 0, 32, 16], [5, 0, 9, 3], [0, 1, 0, 700]], ids=str)
def test_the_kernel_computes_what_is_emulated(counts: list[int], replace: Replace) -> None:
    """On SM 90, forward and backward: products summed in the tensor cores against float32 ones."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    experts = Experts(len(counts), 64, 32)
    experts.initialize(lambda expert: expert, 0.3)
    experts = experts.to("cuda", torch.bfloat16)
    experts.precision = "fp8"
    upstream = torch.randn(sum(counts), 64, device="cuda", dtype=torch.bfloat16)
    rows = torch.randn_like(upstream)
    assert float8.kernel_takes(rows, experts.w_gate_up)

    def everything() -> list[Tensor]:
        x = rows.clone().requires_grad_()
        out = experts(x, torch.tensor(counts, device="cuda"))
        return [out, *torch.autograd.grad(out, (x, *experts.parameters()), upstream)]

    by_kernel = everything()
    replace(float8, "kernel_takes", lambda rows_RX, weights: False)
    for mine, emulated in zip(by_kernel, everything(), strict=True):
        assert (mine.float() - emulated.float()).norm() <= 2e-2 * emulated.float().norm()


def losses(*overrides: str) -> list[float]:
    """Of a training on one batch."""
    run = Trial(tiny_config("balance.router_aux_loss_coef=0.01", *overrides), Mesh.single())
    return [run.step(micro_batches(2), step, 3e-3).loss for step in range(12)]


def test_a_training_in_float8_is_one_in_bfloat16() -> None:
    """Learns as much, on its own way."""
    wanted, found = losses("train.bf16=true"), losses("train.bf16=true", "train.expert_precision=fp8")
    assert wanted[-1] < 0.3 * wanted[0]
    assert found != wanted
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 0.02 * wanted[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model": {"expert": "swiglu_loop"}}, "model.expert=swiglu_loop multiplies rows by weights in its own way; "),
        ({"model": {"expert": "swiglu_clamped"}}, "model.expert=swiglu_clamped multiplies"),
        ({"model": {"num_experts": 0}}, "the model has no expert layer; take compute"),
        ({"lora": {"r": 4, "target_modules": ["q_proj", "experts"]}}, "has adapters beside experts, whose products"),
        ({"lora": {"r": 4, "target_modules": "all-linear"}}, "lora.target_modules=all-linear has adapters"),
        ({"lora": {"r": 4, "quantize": "nf4"}}, "lora.quantize=nf4 are in few bits already"),
        ({"train": {"deterministic": True}}, "as train.deterministic=true wants; take compute"),
    ],
    ids=str,
)
def test_what_float8_does_not_go_with(more: dict[str, Any], said: str) -> None:
    tree = {name: more.get(name, {}) for name in ("model", "train", "lora")}
    load_mapping(tree)
    with pytest.raises(ConfigError) as caught:
        load_mapping(tree | {"train": tree["train"] | {"expert_precision": "fp8"}})
    assert "train.expert_precision=fp8: " in str(caught.value)
    assert said in str(caught.value)


def test_adapters_of_attention_go_with_it() -> None:
    load_mapping({"lora": {"r": 4}, "train": {"expert_precision": "fp8"}})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("train.bf16=true", "model.moe_intermediate_size=32"), "by a kernel on GPUs of compute capability 9.0"),
        (
            ("train.bf16=true",),
            "emulated, slower; a kernel takes them in bfloat16 alone, of sizes that are multiples of",
        ),
        (("model.moe_intermediate_size=32",), "emulated, slower; a kernel takes them in bfloat16 alone"),
    ],
)
def test_a_person_is_told_that_it_is_an_experiment(overrides: tuple[str, ...], said: str) -> None:
    (warning,) = warnings_of(tiny_config("train.expert_precision=fp8", *overrides))
    assert warning.startswith("train.expert_precision=fp8 is an experiment: ")
    assert said in warning
    assert warnings_of(tiny_config(*overrides)) == []
