"""Bytes that one pass keeps for backward, and what it needs for a moment, from the configuration: the tensors that
`moe_dist/models` saves, one by one. `tools/bench/plan.py` holds them against the allocator.

Letters: T tokens of a micro-batch, S sequence, D hidden, H query and G key-value heads of width C, E experts, K of them
for a token, F their width, V vocabulary. `w`: bytes of a number where matrices are multiplied (4, or 2 in bfloat16),
`r`: of the residual stream (2 only with pure_bf16).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_dist.config import Config, ModelConfig
from moe_dist.models.counts import BlockCounts, blocks, loss_chunk


@dataclass(frozen=True)
class Widths:
    """Bytes of numbers, and whether weights are cast for each use (autocast), their copies kept until backward."""

    w: int
    r: int
    casts: bool

    @classmethod
    def of(cls, config: Config) -> Widths:
        half = config.train.bf16 or config.train.pure_bf16
        return cls(2 if half else 4, 2 if config.train.pure_bf16 else 4, config.train.bf16)


@dataclass(frozen=True)
class Activations:
    """Of one block of either kind, for one micro-batch of one rank, in bytes."""

    kept: float
    """From forward to backward."""
    passing: float
    """More, at the worst moment of its backward pass, with gradients of weights before they are added."""
    cached: float = 0.0
    """More, until the forward pass of all blocks ends: autocast's copies of weights, whoever still needs them."""


def norm_bytes(size: float, widths: Widths) -> float:
    """An RMSNorm of one token: its input and its result before the weight in full, and the scale."""
    # In full precision the input is the residual stream itself, which is kept for this norm alone.
    return 4 * size + 4 + widths.r * size


def attention_bytes(config: Config, widths: Widths, device: str) -> float:
    """Kept by attention for one token, without the norm before it. `device`: cpu, or another, which decides how
    documents are kept apart: by a mask of S numbers, or one by one, and what comes out is put together."""
    model, w = config.model, widths.w
    D, H = model.hidden_size, model.num_attention_heads
    mask = 0
    if config.data.document_mask:
        value = model.head_size if model.kv_lora_rank is None else model.v_head_dim
        mask = w * H * value if device == "cpu" else w * config.data.max_seq_length
    if model.kv_lora_rank is not None:
        c, q = model.kv_lora_rank, model.q_lora_rank
        wide, value = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
        kept = 2.0 * w * D if widths.casts else 1.0 * w * D  # inputs of q and of kv
        kept += norm_bytes(c, widths) + w * c + (0 if q is None else norm_bytes(q, widths) + w * q)
        kept += w * H * 2 * wide + w * H * (model.qk_nope_head_dim + value) + w * H * value + 4 * H
        return kept + mask + (8 * model.qk_rope_head_dim if w == 2 else 0)
    C, G = model.head_size, model.kv_heads
    kept = 3.0 * w * D if widths.casts else 1.0 * w * D
    if model.qk_norm:
        kept += (4 + w) * (H + G) * C + 4 * (H + G)
    kept += w * (2 * H + 2 * G) * C + 4 * H
    return kept + mask + (8 * model.rotary_size if w == 2 else 0)  # cosines and sines are cast in each layer


def gated_bytes(size: int, hidden: int, widths: Widths) -> float:
    """A dense gated unit of one token: its four inner tensors, and its input."""
    inputs = 2 * widths.w * hidden if widths.casts else 0.0  # else the norm's result, counted with it
    return 4 * widths.w * size + inputs


def block_activations(
    config: Config, has_experts: bool, tokens: int, device: str, load: float = 1.0, recompute: str | None = None
) -> Activations:
    """Of a block with or without experts. `device`: cpu or another; `load`: rows on the most loaded rank as multiples
    of the mean."""
    model, widths = config.model, Widths.of(config)
    recompute = recompute or config.train.gradient_checkpointing
    w, r, D = widths.w, widths.r, model.hidden_size
    attention = norm_bytes(D, widths) + attention_bytes(config, widths, device)
    kind = blocks(model, [model.moe_layers[0]] if has_experts else [_dense_layer(model)])[0]
    weights = _weight_bytes(kind, config, widths)
    rest = norm_bytes(D, widths)
    if not has_experts:
        rest += (r * D if not widths.casts else 0) + gated_bytes(model.intermediate_size, D, widths)
        busy = 2.0 * w * model.intermediate_size  # three gradients; what the last matrix had kept is gone by then
        worst = tokens * busy + weights.gradients
        held, decisions = weights.dense if widths.casts else 0.0, 0.0
    else:
        E, K, F = model.num_experts, model.num_experts_per_tok, model.moe_intermediate_size
        rows = K * load
        factor = config.train.expert_chunk_factor if model.expert == "swiglu" and not config.lora.r else 0.0
        in_chunks = 0.0 < factor < load
        rest += 4 * D + 12 * E + 12 * K + 4  # the router computes in full precision
        rest += w * (rows * 2 * D + (0.0 if in_chunks else rows * 2 * F)) + 4 * K + 16 * K + 8 * rows
        shared = model.shared_expert_intermediate_size
        beside = gated_bytes(shared, D, widths) + (r * D if r == 2 else 0) if shared else 0.0
        rest += beside
        # What combine and a shared expert had kept is gone by then. Gradients within the unit, then those of rows and
        # of weights; from the second chunk on they are there at once.
        busy, after = w * rows * 4 * F, w * rows * (2 * F + D)
        if in_chunks:
            busy = after = w * (K * factor / 4 * 6 * F + rows * D)
        worst = max(tokens * busy, tokens * after + weights.experts, tokens * w * rows * D + weights.gradients)
        worst -= tokens * beside
        held = weights.dense + weights.experts if widths.casts else 0.0
        decisions = 28.0 * K
    whole = tokens * (attention + rest) + held
    passing = tokens * 2 * r * D + worst
    if recompute == "none":
        return Activations(whole, passing)
    if recompute == "selective":
        cached = float(weights.attention) if widths.casts else 0.0
        kept = tokens * (r * D + rest) + held - cached
        return Activations(kept, passing + tokens * (0 if busy > attention else attention - busy), cached)
    # Experts cast their weights themselves, and keep no copies.
    cached = float(weights.dense) if widths.casts else 0.0
    return Activations(tokens * (r * D + decisions), whole + passing - tokens * r * D, cached)


def layer_activations(config: Config, device: str) -> dict[str, Activations]:
    """Of one layer of each kind that the model has (`expert layer`, `dense layer`), for one micro-batch on a rank with
    its share of rows. `device`: cpu, or another."""
    tokens = config.train.per_device_train_batch_size * config.rows_per_sample * config.data.max_seq_length
    num_moe = len(config.model.moe_layers)
    kinds = {"expert layer": num_moe, "dense layer": config.model.num_hidden_layers - num_moe}
    return {
        name: block_activations(config, name == "expert layer", tokens, device)
        for name, number in kinds.items()
        if number
    }


@dataclass(frozen=True)
class _Weights:
    dense: float
    """Bytes of the cast copies of matrices that are not of experts."""
    attention: float
    experts: float
    gradients: float
    """Of the largest weight, or of both stacks of experts at once, in the dtype of computing, and of one in full,
    before they are added to what is kept."""


def _weight_bytes(kind: BlockCounts, config: Config, widths: Widths) -> _Weights:
    experts, w, whole = kind.experts / config.parallel.ep_size, widths.w, 4 if widths.casts else 0
    dense = kind.multiplying - kind.router
    largest = max(kind.attention, kind.dense_mlp) / 3
    gradients = w * experts + whole * 2 / 3 * experts if experts else (w + whole) * largest
    return _Weights(w * dense, w * kind.attention, w * experts, gradients)


def _dense_layer(model: ModelConfig) -> int:
    return next(layer for layer in range(model.num_hidden_layers) if not model.has_experts(layer))


def head_activations(config: Config, tokens: int, device: str) -> Activations:
    """Of final norm, head and loss. `device`: cpu, or another, which decides how many tokens' logits are there at once.

    With chunks both gradients are there when the forward pass ends, and `passing` is what they need until then.
    """
    model, widths = config.model, Widths.of(config)
    w, D, V = widths.w, model.hidden_size, model.vocab_size
    # Under autocast the norm's result is there in full, too, beside its cast.
    norm = tokens * (norm_bytes(D, widths) + w * D + (widths.r * D if widths.casts else 0))
    cast = w * V * D if widths.casts else 0
    chunk = loss_chunk(config.train.loss_chunk_tokens, device, V)
    if not chunk:
        # Two gradients in full beside the log-softmax; once that is gone, the head's own.
        weight = (w + (4 if widths.casts else 0)) * V * D
        return Activations(norm + cast + 4 * tokens * V, max(8 * tokens * V, weight))
    at_once = min(tokens, chunk)
    weight = 4 if widths.casts else w
    kept = norm + tokens * w * D + weight * V * D
    logits = at_once * V * (4 if w == 4 else 2 + 4 + 2)  # in bfloat16 also in full, and their gradient
    product = 0 if w == 4 else (w + 4) * V * D  # and in full, to be added
    summed = (4 - weight) * V * D
    return Activations(kept, logits + cast + product + summed)


def shared_bytes(config: Config, tokens: int, device: str) -> float:
    """What all blocks of a rank use together: ids, a mask of documents, cosines and sines."""
    mask = config.data.max_seq_length if config.data.document_mask and device != "cpu" else 0
    return tokens * (32 + mask + 8 * config.model.rotary_size)
