"""The logical tensors of a model by name, from its configuration alone: the same in every layout. No torch.

Of the built-in `topk` router and the `swiglu` experts; only a model that has been built knows classes of your own.
Letters as in `counts.py`: V vocab_size, D hidden_size, C head width, E experts, F moe_intermediate_size.
"""

from __future__ import annotations

import re

from moe_dist.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]

STACKED = ("swiglu", "swiglu_loop", "swiglu_clamped")
"""Values of `model.expert` whose tensors are known here."""
SELECTION_BIAS = "moe.router.bias_E"
"""Within a block: what moves the choice of experts. State, not a parameter."""
_NEVER_DECAYED = re.compile(r"(?:^|[._])(?:bias(?:[._]|$)|(?:layer|rms|group|batch)?norm(?:\.|$))", re.IGNORECASE)

_QUANTIZED = re.compile(
    r"\.(?:(?:attention|mlp|moe\.shared_expert)\.\w+_proj\.weight|moe\.experts\.w_(?:gate_up|down))$"
)
_OF_ONE = re.compile(r"(.+)\[\d+\]")


def decays(name: str, ndim: int) -> bool:
    """Whether weight decay shrinks a parameter: matrices and embeddings, never biases and weights of norms.

    `ndim`: its dimensions, of a stack of experts those of one expert.
    """
    return ndim >= 2 and not _NEVER_DECAYED.search(name)


def is_quantized(name: str) -> bool:
    """Whether `lora.quantize` holds this weight in few bits: linear maps of blocks and experts, not routers, embedding,
    head and norms."""
    return bool(_QUANTIZED.search(name))


def one_expert(name: str, expert: int) -> str:
    """Name of one expert's part of a stack: `layers.0.moe.experts.w_down[3]`."""
    return f"{name}[{expert}]"


def stack_of(name: str) -> tuple[str, bool]:
    """Name of the stack that a name of `one_expert` belongs to; any other name itself, and False."""
    found = _OF_ONE.fullmatch(name)
    return (found[1], True) if found else (name, False)


def logical_shapes(model: ModelConfig) -> Shapes:
    """Name -> shape of every parameter and buffer, as `Transformer.state_dict()` of the whole model has them.

    Of a router or an expert of another class nothing is listed.
    """
    V, D = model.vocab_size, model.hidden_size
    shapes: Shapes = {"embed_tokens.weight": (V, D)}
    for layer in range(model.num_hidden_layers):
        block = block_shapes(model, model.has_experts(layer))
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | {"norm.weight": (D,), "lm_head.weight": (V, D)}


def block_shapes(model: ModelConfig, has_experts: bool) -> Shapes:
    """As `logical_shapes`, of one block of either kind, by names within it."""
    D, E, F = model.hidden_size, model.num_experts, model.moe_intermediate_size
    shapes: Shapes = {"input_norm.weight": (D,), "post_attention_norm.weight": (D,)}
    shapes |= {f"attention.{name}": shape for name, shape in _attention(model).items()}
    if not has_experts:
        return shapes | _swiglu("mlp", D, model.intermediate_size)
    if model.router == "topk":
        shapes |= {"moe.router.weight": (E, D), SELECTION_BIAS: (E,)}
        shapes |= {"moe.router.logits_bias_E": (E,)} if model.router_bias else {}
    if model.expert in STACKED:
        shapes |= {"moe.experts.w_gate_up": (E, D, 2 * F), "moe.experts.w_down": (E, F, D)}
    if model.expert == "swiglu_clamped":
        shapes |= {"moe.experts.b_gate_up": (E, 2 * F), "moe.experts.b_down": (E, D)}
    if model.shared_expert_intermediate_size:
        shapes |= _swiglu("moe.shared_expert", D, model.shared_expert_intermediate_size)
    if model.shared_expert_gate:
        shapes["moe.shared_expert_gate.weight"] = (1, D)
    return shapes


def _attention(model: ModelConfig) -> Shapes:
    if model.kv_lora_rank is not None:
        return _latent_attention(model, model.kv_lora_rank)
    D, C = model.hidden_size, model.head_size
    widths = {"q": model.num_attention_heads * C, "k": model.kv_heads * C, "v": model.kv_heads * C}
    shapes: Shapes = {f"{name}_proj.weight": (width, D) for name, width in widths.items()}
    shapes["o_proj.weight"] = (D, widths["q"])
    biased = widths | {"o": D} if model.attention_bias else widths if model.qkv_bias else {}
    shapes |= {f"{name}_proj.bias": (width,) for name, width in biased.items()}
    if model.qk_norm:
        shapes |= {f"{name}_norm.weight": (C if model.qk_norm_per_head else widths[name],) for name in "qk"}
    if model.attention_sinks:
        shapes["sinks"] = (model.num_attention_heads,)
    return shapes


def _latent_attention(model: ModelConfig, rank: int) -> Shapes:
    D, H = model.hidden_size, model.num_attention_heads
    plain, turned, value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    narrow: Shapes = {"kv_a_proj.weight": (rank + turned, D)}
    shapes: Shapes = {"kv_a_norm.weight": (rank,), "kv_b_proj.weight": (H * (plain + value), rank)}
    if model.q_lora_rank is None:
        shapes["q_proj.weight"] = (H * (plain + turned), D)
    else:
        narrow["q_a_proj.weight"] = (model.q_lora_rank, D)
        shapes |= {"q_a_norm.weight": (model.q_lora_rank,)}
        shapes |= {"q_b_proj.weight": (H * (plain + turned), model.q_lora_rank)}
    narrow["o_proj.weight"] = (D, H * value)
    if model.attention_bias:
        narrow |= {name.replace(".weight", ".bias"): (shape[0],) for name, shape in narrow.items()}
    return shapes | narrow


def _swiglu(name: str, hidden: int, inner: int) -> Shapes:
    shapes: Shapes = {f"{name}.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
    return shapes | {f"{name}.down_proj.weight": (hidden, inner)}
