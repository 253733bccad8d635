"""The loss in chunks against the loss of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist.config import load_mapping
from moe_dist.models.precision import in_dtype
from moe_dist.models.transformer import Transformer
from moe_dist.train.loss import head_cross_entropy

TOKENS, HIDDEN, VOCABULARY = (3, 11), 16, 301


def parts(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, TOKENS, generator=generator)
    labels[0, ::3] = labels[1] = -100
    return hidden, weight, labels


def outcome(
    chunk: Any, smoothing: float = 0.0, factor: float = 1.0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    hidden, weight, labels = parts(dtype)
    scale = torch.tensor(1 / 17)
    loss = head_cross_entropy(hidden, weight, labels, smoothing, scale=scale, chunk_tokens=chunk)
    return [loss.detach(), *torch.autograd.grad(loss * factor, (hidden, weight))]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


@pytest.mark.parametrize("chunk", [1, 7, 33, 1000, "auto"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chunks_change_nothing(chunk: Any, smoothing: float) -> None:
    """Loss and both gradients, in float32 and to rounding in float64. Seen to fail with the gradient of the last chunk
    alone, and with label smoothing left out of the gradient."""
    assert apart(outcome(chunk, smoothing), outcome(0, smoothing)) < 1e-6
    with in_dtype(torch.float64):
        exact = outcome(0, smoothing, dtype=torch.float64)
        assert apart(outcome(chunk, smoothing, dtype=torch.float64), exact) < 1e-13


def test_a_loss_that_is_multiplied() -> None:
    """Gradients are made with the loss, and still follow what becomes of it. Planted: `gradient` not looked at."""
    assert apart(outcome(7, factor=3.0), outcome(0, factor=3.0)) < 1e-6
    assert outcome(7, factor=float("nan"))[1].isnan().all()


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_as_exact_as_all_logits(autocast: bool) -> None:
    """Autocast, or weights in bfloat16: the distance to float32 is not larger. The weight's gradient is summed in full
    precision over chunks. Planted: summed in bfloat16 over chunks of one token."""
    dtype = torch.float32 if autocast else torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        full, chunks = (outcome(chunk, dtype=dtype) for chunk in (0, 1))
    exact = outcome(0)
    assert chunks[0].dtype == torch.float32
    assert chunks[2].dtype == dtype
    for ours, whole, wanted in zip(chunks, full, exact, strict=True):
        assert apart([ours], [wanted]) < 1.3 * apart([whole], [wanted]) + 1e-5


def test_frozen_parts_and_no_gradients() -> None:
    hidden, weight, labels = parts()
    wanted = outcome(0)
    loss = head_cross_entropy(hidden, weight.detach(), labels, scale=1 / 17, chunk_tokens=7)
    assert apart(list(torch.autograd.grad(loss, (hidden,))), wanted[1:2]) < 1e-6
    loss = head_cross_entropy(hidden.detach(), weight, labels, scale=1 / 17, chunk_tokens=7)
    assert apart(list(torch.autograd.grad(loss, (weight,))), wanted[2:]) < 1e-6
    with torch.no_grad():
        loss = head_cross_entropy(hidden, weight, labels, scale=1 / 17, chunk_tokens=7)
    assert apart([loss.detach()], wanted[:1]) < 1e-6


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_never_holds_all_logits(tied: bool) -> None:
    """Forward and backward of a model; a tied weight gets the gradients of both its places."""
    keys = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 2, "vocab_size": 500}
    sizes = {"moe_intermediate_size": 8, "intermediate_size": 8, "num_experts_per_tok": 2, "head_dim": 4}
    options = {"num_key_value_heads": 2, "tie_word_embeddings": tied}
    model = Transformer(load_mapping({"model": keys | sizes | options}).model)
    model.initialize(0)
    ids, gradients = torch.randint(0, 500, (2, 40)), []
    for chunk, largest in ((0, 2 * 40 * 500), (8, 500 * 8)):

        def loss_of(hidden: Tensor, weight: Tensor, chunk: int = chunk) -> Tensor:
            return head_cross_entropy(hidden, weight, ids, chunk_tokens=chunk)

        with Largest() as seen:
            loss = model(ids, head_function=loss_of)
            gradients.append(list(torch.autograd.grad(loss, list(model.parameters()))))
        assert seen.numel == largest
    assert max(apart([one], [other]) for one, other in zip(*gradients, strict=True) if other.norm() > 0) < 1e-5
