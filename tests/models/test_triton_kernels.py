"""Triton's kernels against the plain path, in Triton's interpreter: no GPU is needed, and sizes are tiny."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from patches import Replace, replaced
from tiny import micro_batches, tiny_config
from torch import Tensor

from moe_dist import models
from moe_dist.config import ConfigError
from moe_dist.models import kernel_choice
from moe_dist.models.experts import Experts, swiglu
from moe_dist.models.kernel_choice import require_kernels
from moe_dist.models.layers import ACTIVATIONS
from moe_dist.models.permute import place_by_expert, rows_from_tokens, sort_by_expert, sum_rows, tokens_from_rows
from moe_dist.parallel.mesh import Mesh
from moe_dist.verify.trial import Trial, difference

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]'")
FLOATS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[ModuleType]:
    """The module, decorated for the interpreter; blocks are so small that rows have several, the last not full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from moe_dist.models import triton_kernels

        importlib.reload(triton_kernels)
        patch.setattr(triton_kernels, "_LARGEST_BLOCK", 4)
        yield triton_kernels


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Within the rounding of the coarsest number: gradients of weights are float32, of products of bfloat16 too."""
    tolerance = max(FLOATS[tensor.dtype] for tensor in wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert (mine.double() - theirs.double()).norm() <= tolerance * theirs.double().norm()


def moved(
    kernels: str, ids_TK: Tensor, num_experts: int, width: int, dtype: torch.dtype, places: int | None = None
) -> list[Tensor]:
    """Rows, sums weighted and not, and the gradients of all. `places`: of every expert, where they are fixed."""
    torch.manual_seed(0)
    x = torch.randn(ids_TK.shape[0], width).to(dtype).requires_grad_()
    weights = torch.rand(ids_TK.shape).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    if places is None:
        permutation = sort_by_expert(ids_TK, num_experts, int((ids_TK < num_experts).sum()), kernels)
    else:
        permutation = place_by_expert(ids_TK, num_experts, places, kernels)
    rows = rows_from_tokens(x, permutation)
    # Rows of their own: with those of `x` errors of one pass could undo those of the other.
    own = torch.randn(rows.shape).to(dtype).requires_grad_()
    weighted, plain = tokens_from_rows(own, weights, permutation), sum_rows(own, permutation)
    upstream = torch.randn(3, *weighted.shape).to(dtype)
    found = [rows, weighted, plain]
    found += torch.autograd.grad(rows, x, torch.randn(rows.shape).to(dtype))
    found += torch.autograd.grad(weighted, (own, weights), upstream[0])
    # Strided, and expanded as of a sum.
    found += torch.autograd.grad(plain, own, upstream[1].t().contiguous().t())
    found += torch.autograd.grad(tokens_from_rows(own, weights, permutation).sum(), (own, weights))
    return found


CHOICES = {
    "every pair": [[0, 2, 1], [3, 0, 2], [2, 1, 0], [3, 2, 0], [1, 2, 3]],
    "some without an expert": [[0, 4, 1], [4, 4, 4], [2, 4, 0], [4, 2, 0]],
    "idle experts": [[3, 1, 3], [1, 3, 1]],
    "no row": [[4, 4], [4, 4], [4, 4]],
    "top-1": [[2], [0], [4], [2], [3]],
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("choices", CHOICES)
def test_rows_go_and_come_as_in_the_plain_path(choices: str, dtype: torch.dtype) -> None:
    ids = torch.tensor(CHOICES[choices])
    for width, places in ((1, None), (7, None), (7, 2)):
        found, wanted = (moved(name, ids, 4, width, dtype, places) for name in ("triton", "torch"))
        assert_close(found, wanted)


def test_no_tokens() -> None:
    ids = torch.empty(0, 2, dtype=torch.int64)
    assert_close(moved("triton", ids, 4, 7, torch.float32), moved("torch", ids, 4, 7, torch.float32))


def test_weights_of_pairs_without_a_row_are_not_looked_at() -> None:
    ids = torch.tensor([[0, 4], [1, 2]])
    permutation = sort_by_expert(ids, 4, 3, "triton")
    weights = torch.tensor([[0.5, float("inf")], [0.25, 2.0]])
    out = tokens_from_rows(torch.ones(3, 5), weights, permutation)
    assert torch.equal(out, torch.tensor([0.5, 2.25])[:, None].expand(2, 5))


def units(kernels: str, activation: str, dtype: torch.dtype, num_rows: int = 3) -> list[Tensor]:
    """A gated unit and its gradient."""
    torch.manual_seed(0)
    gate_up = (3 * torch.randn(num_rows, 2 * 7)).to(dtype).requires_grad_()
    out = swiglu(gate_up, activation, kernels)
    return [out, *torch.autograd.grad(out, gate_up, torch.randn(out.shape).to(dtype))]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_units_are_those_of_the_plain_path(activation: str, dtype: torch.dtype) -> None:
    for num_rows in (3, 0):
        assert_close(units("triton", activation, dtype, num_rows), units("torch", activation, dtype, num_rows))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_a_gate_far_from_zero_is_no_nan() -> None:
    gate_up = torch.tensor([[-2e4, 2e4, 1.0, 1.0]])
    for activation in ACTIVATIONS:
        assert_close([swiglu(gate_up, activation, "triton")], [swiglu(gate_up, activation)])


def stack(kernels: str, counts: list[int], dtype: torch.dtype, chunk_rows: int = 0) -> list[Tensor]:
    """Experts of every kind of load, and their gradients."""
    experts = Experts(len(counts), 8, 16)
    experts.initialize(lambda expert: expert, 0.3)
    experts = experts.to(dtype)
    experts.kernels, experts.chunk_rows = kernels, chunk_rows
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), 8).to(dtype).requires_grad_()
    out = experts(rows, torch.tensor(counts))
    return [out, *torch.autograd.grad(out, (rows, *experts.parameters()), torch.randn(out.shape).to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("counts", "chunk_rows"), [([3, 0, 4], 0), ([0, 0], 0), ([2, 0, 5], 3)])
def test_experts_are_those_of_the_plain_path(
    kernels: ModuleType, counts: list[int], chunk_rows: int, dtype: torch.dtype
) -> None:
    wanted = stack("torch", counts, dtype, chunk_rows)
    if not sum(counts):
        assert_close(stack("triton", counts, dtype, chunk_rows), wanted)
        return
    with replaced(kernels, "swiglu_backward", kernels.swiglu_backward), replaced(kernels, "swiglu", kernels.swiglu):
        assert_close(stack("triton", counts, dtype, chunk_rows), wanted)


BUGS = {
    "_gather": ("// TOP_K\n    numbers", "% TOP_K\n    numbers"),
    "_sum_by_token": ("total += part", "total = part"),
    "_sum_by_token of the last row": ("row < num_rows", "row < num_rows - 1"),
    "_weighted_gradients of rows": ("(numbers * weight)", "numbers"),
    "_weighted_gradients of weights": ("products += numbers", "products = numbers"),
    "_swiglu": ("hidden = gate * _share", "hidden = _share"),
    "_swiglu_backward of the gate": ("share + gate * _slope", "share - gate * _slope"),
    "_swiglu_backward of what is multiplied": ("(grad * activated)", "(grad * share)"),
    "_swiglu_backward again forward": ("(activated * up)", "activated"),
    "gelu_tanh": ("0.21406444881780073", "0.07135481627260025"),
    "gelu": ("-0.5 * gate", "-1.0 * gate"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug: str, kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel with a mistake in its source."""
    right, wrong = BUGS[bug]
    source = Path(str(kernels.__file__)).read_text().replace("_LARGEST_BLOCK = 1024", "_LARGEST_BLOCK = 4")
    assert source.count(right) == 1
    (tmp_path / "planted.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("planted", tmp_path / "planted.py")
    assert spec is not None
    assert spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec.loader.exec_module(planted)

    def everything(kernels: str) -> list[Tensor]:
        found = [unit for activation in ACTIVATIONS for unit in units(kernels, activation, torch.float32)]
        found += moved(kernels, torch.tensor(CHOICES["some without an expert"]), 4, 7, torch.float32)
        return found + stack(kernels, [2, 1], torch.float32)

    wanted = everything("torch")
    assert_close(everything("triton"), wanted)
    monkeypatch.setattr(models, "triton_kernels", planted)
    with pytest.raises(AssertionError):
        assert_close(everything("triton"), wanted)


def gradients(*overrides: str) -> dict[str, Tensor]:
    parts = Trial(tiny_config("model.num_hidden_layers=1", "model.mlp_only_layers=[]", *overrides), Mesh.single())
    with parts.unclipped() as found:
        parts.step(micro_batches(2), 0, 0.0)
    return dict(found)


def test_a_whole_step(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing, padding and gradients of a layer, the router's among them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "_LARGEST_BLOCK", 1024)
    with (
        replaced(kernels, "gather", kernels.gather),
        replaced(kernels, "sum_by_token", kernels.sum_by_token),
        replaced(kernels, "weighted_gradients", kernels.weighted_gradients),
        replaced(kernels, "swiglu", kernels.swiglu),
        replaced(kernels, "swiglu_backward", kernels.swiglu_backward),
    ):
        found = gradients("train.kernels=triton")
    assert difference(found, gradients()) < 1e-5


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, replace: Replace) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    require_kernels("triton", "cuda")
    require_kernels("torch", "cpu")
    with pytest.raises(ConfigError, match=r"train.kernels=triton: these are kernels of GPUs.*; take train.kernels=to"):
        Trial(tiny_config("train.kernels=triton"), Mesh.single())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    require_kernels("triton", "cpu")
    replace(kernel_choice, "find_spec", lambda name: None)
    require_kernels("torch", "cpu")
    with pytest.raises(ConfigError, match=r"train.kernels=triton: Triton is not installed; .*pip install triton, or"):
        require_kernels("triton", "cuda")


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from moe_dist.models import triton_kernels as kernels
import triton.language as tl

def build(kernel, dtype, pointers, numbers, **constants):
    types = {name: "*i64" if "_of_" in name else "*fp32" if "weights" in name else "*" + dtype for name in pointers}
    types |= dict.fromkeys(numbers, "i32") | dict.fromkeys(constants, "constexpr")
    types = {name: types[name] for name in kernel.arg_names}
    built = compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", int(sys.argv[1]), 32))
    assert len(built.asm["cubin"]) > 1000

for dtype in ("bf16", "fp32"):
    full = {"FULL": tl.float32, "BLOCK": 1024}
    build(kernels._gather, dtype, ["x", "pair_of_row", "out"], ["width"], TOP_K=8, BLOCK=1024)
    build(kernels._sum_by_token, dtype, ["rows", "row_of_pair", "weights", "out"], ["num_rows", "width"],
          TOP_K=8, IS_WEIGHTED=True, **full)
    build(kernels._weighted_gradients, dtype, ["grad", "rows", "weights", "pair_of_row", "grad_rows", "grad_weights"],
          ["width"], TOP_K=8, WANT_ROWS=True, WANT_WEIGHTS=True, **full)
    for activation in ("silu", "gelu", "gelu_tanh"):
        build(kernels._swiglu, dtype, ["gate_up", "out"], ["width"], ACTIVATION=activation, **full)
        build(kernels._swiglu_backward, dtype, ["grad_hidden", "gate_up", "hidden", "grad_gate_up"], ["width"],
              WANT_HIDDEN=True, ACTIVATION=activation, **full)
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_for_gpus(capability: int, tmp_path: Path) -> None:
    """To machine code, without a GPU: what the interpreter lets pass and the compiler does not."""
    here = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    here |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
