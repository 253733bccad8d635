"""The logical tensors of a model by name, from its configuration alone: the same in every layout. No torch.

Of the built-in `topk` router and the `swiglu` experts; only a model that has been built knows classes of your own.
Letters as in `counts.py`: V vocab_size, D hidden_size, C head width, E experts, F moe_intermediate_size.
"""

from __future__ import annotations

import re

from moe_dist.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]

STACKED = ("swiglu", "swiglu_loop")
"""Values of `model.expert` whose tensors are known here."""
_NEVER_DECAYED = re.compile(r"(?:^|[._])(?:bias(?:[._]|$)|(?:layer|rms|group|batch)?norm(?:\.|$))", re.IGNORECASE)


def decays(name: str, ndim: int) -> bool:
    """Whether weight decay shrinks a parameter: matrices and embeddings, never biases and weights of norms.

    `ndim`: its dimensions, of a stack of experts those of one expert.
    """
    return ndim >= 2 and not _NEVER_DECAYED.search(name)


def logical_shapes(model: ModelConfig) -> Shapes:
    """Name -> shape of every parameter and buffer, as `Transformer.state_dict()` of the whole model has them.

    Of a router or an expert of another class nothing is listed.
    """
    V, D = model.vocab_size, model.hidden_size
    shapes: Shapes = {"embed_tokens.weight": (V, D)}
    for layer in range(model.num_hidden_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in _block(model, layer).items()}
    return shapes | {"norm.weight": (D,), "lm_head.weight": (V, D)}


def _block(model: ModelConfig, layer: int) -> Shapes:
    D, E, F = model.hidden_size, model.num_experts, model.moe_intermediate_size
    shapes: Shapes = {"input_norm.weight": (D,), "post_attention_norm.weight": (D,)}
    shapes |= {f"attention.{name}": shape for name, shape in _attention(model).items()}
    if not model.has_experts(layer):
        return shapes | _swiglu("mlp", D, model.intermediate_size)
    if model.router == "topk":
        shapes |= {"moe.router.weight": (E, D), "moe.router.bias_E": (E,)}
    if model.expert in STACKED:
        shapes |= {"moe.experts.w_gate_up": (E, D, 2 * F), "moe.experts.w_down": (E, F, D)}
    if model.shared_expert_intermediate_size:
        shapes |= _swiglu("moe.shared_expert", D, model.shared_expert_intermediate_size)
    return shapes


def _attention(model: ModelConfig) -> Shapes:
    D, C = model.hidden_size, model.head_size
    widths = {"q": model.num_attention_heads * C, "k": model.kv_heads * C, "v": model.kv_heads * C}
    shapes: Shapes = {f"{name}_proj.weight": (width, D) for name, width in widths.items()}
    shapes["o_proj.weight"] = (D, widths["q"])
    if model.attention_bias:
        shapes |= {f"{name}_proj.bias": (width,) for name, width in (widths | {"o": D}).items()}
    if model.qk_norm:
        shapes |= {"q_norm.weight": (C,), "k_norm.weight": (C,)}
    return shapes


def _swiglu(name: str, hidden: int, inner: int) -> Shapes:
    shapes: Shapes = {f"{name}.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
    return shapes | {f"{name}.down_proj.weight": (hidden, inner)}
