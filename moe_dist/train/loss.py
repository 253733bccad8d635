"""The loss. One rule for scale: a sum over tokens here, divided once by the valid tokens of the global batch.

Shape suffixes: B batch, S sequence, T = B * S tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.models.counts import loss_chunk
from moe_dist.models.precision import full, full_dtype

IGNORE = -100
"""Label of a position that has no target."""


def cross_entropy_sum(logits_BSV: Tensor, labels_BS: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum over valid tokens of the cross-entropy in nats, 0-dim float32; labels of -100 do not count."""
    return F.cross_entropy(
        full(logits_BSV.flatten(0, 1)),
        labels_BS.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def head_cross_entropy(
    hidden_BSD: Tensor,
    weight_VD: Tensor,
    labels_BS: Tensor,
    label_smoothing: float = 0.0,
    *,
    scale: Tensor | float = 1.0,
    chunk_tokens: int | Literal["auto"] = "auto",
) -> Tensor:
    """`scale` times `cross_entropy_sum` of the logits hidden @ weight.T, 0-dim float32, without holding all of them.

    `chunk_tokens`: tokens whose logits are there at once (`train.loss_chunk_tokens`); 0: all, the specification. Both
    gradients are made with the loss, chunk by chunk, that of the weight summed in float32; so what is to be multiplied
    is best given as `scale`. Computes in the dtype of autocast or of the weight, and from logits on in float32.
    """
    chunk_tokens = loss_chunk(chunk_tokens, hidden_BSD.device.type, len(weight_VD))
    if chunk_tokens == 0:
        return cross_entropy_sum(F.linear(hidden_BSD, weight_VD), labels_BS, label_smoothing) * scale
    device = hidden_BSD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    hidden_TD, labels_T = hidden_BSD.flatten(0, 1).to(dtype), labels_BS.flatten()
    return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, labels_T, label_smoothing, scale, chunk_tokens)


def head_log_probs(
    hidden_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, *, chunk_tokens: int | Literal["auto"] = "auto"
) -> Tensor:
    """Log-probability of each label (B, S) under the logits hidden @ weight.T, full precision; 0 where there is none.

    Chunks as in `head_cross_entropy`. What is made of them decides their gradients, so backward computes logits again.
    """
    chunk_tokens = loss_chunk(chunk_tokens, hidden_BSD.device.type, len(weight_VD))
    if chunk_tokens == 0:
        logits_TV = full(F.linear(hidden_BSD, weight_VD)).flatten(0, 1)
        losses_T = F.cross_entropy(logits_TV, labels_BS.flatten(), ignore_index=IGNORE, reduction="none")
        return -losses_T.view_as(labels_BS)
    device = hidden_BSD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    hidden_TD = hidden_BSD.flatten(0, 1).to(dtype)
    return _ChunkedLogProbs.apply(hidden_TD, weight_VD, labels_BS.flatten(), chunk_tokens).view_as(labels_BS)


class _ChunkedLogProbs(torch.autograd.Function):
    """Four matmuls where all logits would take three: those of a chunk are made once more for the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int) -> Tensor:
        log_probs_T = hidden_TD.new_zeros(len(hidden_TD), dtype=full_dtype())
        sums_T = torch.empty_like(log_probs_T)
        for part, logits_CV in _logits_of_chunks(hidden_TD, weight_VD, chunk_tokens):
            labels_C = labels_T[part]
            sums_T[part] = logits_CV.logsumexp(1)
            found_C = logits_CV.gather(1, labels_C.clamp(min=0)[:, None])[:, 0] - sums_T[part]
            log_probs_T[part] = found_C.masked_fill(labels_C == IGNORE, 0.0)
        ctx.save_for_backward(hidden_TD, weight_VD, labels_T, sums_T)
        ctx.chunk_tokens = chunk_tokens
        return log_probs_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, labels_T, sums_T = ctx.saved_tensors
        want_hidden, want_weight, *_ = ctx.needs_input_grad
        dtype = hidden_TD.dtype
        d_hidden = torch.empty_like(hidden_TD) if want_hidden else None
        d_weight = weight_VD.new_zeros(weight_VD.shape, dtype=full_dtype()) if want_weight else None
        gradient_T = gradient_T.masked_fill(labels_T == IGNORE, 0.0)
        weight_cast = weight_VD.to(dtype)
        for part, logits_CV in _logits_of_chunks(hidden_TD, weight_cast, ctx.chunk_tokens):
            # Of log p: 1 at the label less the probability, each times what comes from above.
            d_logits = logits_CV.sub_(sums_T[part, None]).exp_().mul_(-gradient_T[part, None])
            d_logits.scatter_add_(1, labels_T[part, None].clamp(min=0), gradient_T[part, None])
            d_logits = d_logits.to(dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight_cast, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, d_logits, hidden_TD[part])
        return d_hidden, None if d_weight is None else d_weight.to(weight_VD.dtype), None, None


def _logits_of_chunks(hidden_TD: Tensor, weight_VD: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, their logits (C, V)), these in full precision and to be written over, computed in that of the tokens."""
    with torch.autocast(hidden_TD.device.type, enabled=False):
        weight_DV = weight_VD.to(hidden_TD.dtype).t()
        buffer = hidden_TD.new_empty(min(chunk_tokens, len(hidden_TD)), len(weight_VD))
        for start in range(0, len(hidden_TD), chunk_tokens):
            part = slice(start, min(start + chunk_tokens, len(hidden_TD)))
            x_CD = hidden_TD[part]
            yield part, full(torch.mm(x_CD, weight_DV, out=buffer[: len(x_CD)]))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Three matmuls, as with all logits: gradients come with the loss, while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        label_smoothing: float,
        scale: Tensor | float,
        chunk_tokens: int,
    ) -> Tensor:
        want_hidden, want_weight, *_ = ctx.needs_input_grad
        dtype, num_classes = hidden_TD.dtype, len(weight_VD)
        d_hidden = torch.empty_like(hidden_TD) if want_hidden else None
        d_weight = weight_VD.new_zeros(weight_VD.shape, dtype=full_dtype()) if want_weight else None
        total = hidden_TD.new_zeros((), dtype=full_dtype())
        buffer = hidden_TD.new_empty(min(chunk_tokens, len(hidden_TD)), num_classes)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            weight_VD, kept_dtype = weight_VD.to(dtype), weight_VD.dtype
            for start in range(0, len(hidden_TD), chunk_tokens):
                x_CD, labels_C = (tensor[start : start + chunk_tokens] for tensor in (hidden_TD, labels_T))
                logits_CV = full(torch.mm(x_CD, weight_VD.t(), out=buffer[: len(x_CD)]))
                # In place, as all below: memory that is not there need not be read and written. Only the CPU's kernel
                # is known to read each row before it writes it.
                out = logits_CV if logits_CV.device.type == "cpu" else torch.empty_like(logits_CV)
                logits_CV = torch.ops.aten._log_softmax.out(logits_CV, 1, False, out=out)
                valid_C1, label_C1 = (labels_C != IGNORE)[:, None], labels_C.masked_fill(labels_C == IGNORE, 0)[:, None]
                losses_C1 = logits_CV.gather(1, label_C1) * (label_smoothing - 1.0)
                if label_smoothing:
                    losses_C1 -= label_smoothing * logits_CV.mean(1, keepdim=True)
                total += losses_C1.masked_fill(~valid_C1, 0.0).sum()
                if not (want_hidden or want_weight):
                    continue
                d_logits = logits_CV.exp_()
                if label_smoothing:
                    d_logits.sub_(label_smoothing / num_classes)
                d_logits.scatter_add_(1, label_C1, d_logits.new_full(label_C1.shape, label_smoothing - 1.0))
                d_logits = d_logits.mul_(valid_C1 * scale).to(dtype)
                if d_hidden is not None:
                    torch.mm(d_logits, weight_VD, out=d_hidden[start : start + chunk_tokens])
                if d_weight is not None:
                    _add_product(d_weight, d_logits, x_CD)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(kept_dtype))
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        # To multiply the weight's by 1 would take as much memory again; elsewhere a look at the number is a wait.
        if gradient.device.type != "cpu" or gradient.item() != 1.0:
            d_hidden, d_weight = (
                None if tensor is None else tensor * gradient.to(tensor.dtype) for tensor in (d_hidden, d_weight)
            )
        return d_hidden, d_weight, None, None, None, None


def _add_product(total_VD: Tensor, d_logits_CV: Tensor, x_CD: Tensor) -> None:
    """total += d_logits.T @ x, the sum in full precision."""
    if d_logits_CV.dtype == total_VD.dtype:
        total_VD.addmm_(d_logits_CV.t(), x_CD)
    else:
        total_VD.add_(d_logits_CV.t() @ x_CD)
