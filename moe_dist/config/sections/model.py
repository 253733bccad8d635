"""The transformer, by the names of Hugging Face."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_dist.config.paths import PathText
from moe_dist.config.sections.base import (
    RUNS_CODE,
    NonNegative,
    Positive,
    PositiveFloat,
    Probability,
    Section,
)
from moe_dist.config.sections.rope import check_rope_scaling

EXPERT_CHOICE = "expert_choice"
"""Value of model.router: experts choose tokens."""


def divisors(number: int) -> str:
    """For error messages; bounded, so that a mistyped huge number is answered at once."""
    return ", ".join(str(n) for n in range(1, min(number, 4096) + 1) if number % n == 0)


def check_model(model: ModelConfig) -> ModelConfig:
    """Routing, attention heads and layer numbers that one transformer can have."""
    if model.router == EXPERT_CHOICE and (model.n_group > 1 or model.scoring_func != "softmax"):
        other = f"n_group={model.n_group}" if model.n_group > 1 else f"scoring_func={model.scoring_func}"
        raise ValueError(
            f"router={EXPERT_CHOICE}: experts choose by softmax scores, among all tokens; not with {other}"
        )
    if model.num_experts:
        if model.num_experts_per_tok > model.num_experts:
            raise ValueError(
                f"num_experts_per_tok={model.num_experts_per_tok}: at most num_experts={model.num_experts}"
            )
        if model.num_experts_per_tok == 1 and model.norm_topk_prob and model.router == "topk":
            raise ValueError(
                "norm_topk_prob=true: with num_experts_per_tok=1 the renormalised weight is always 1 and "
                "the router never learns; set norm_topk_prob=false or num_experts_per_tok>=2"
            )
        if model.num_experts % model.n_group:
            raise ValueError(f"n_group={model.n_group}: must divide num_experts={model.num_experts}")
        if model.topk_group > model.n_group:
            raise ValueError(f"topk_group={model.topk_group}: at most n_group={model.n_group}")
        reachable = model.topk_group * (model.num_experts // model.n_group)
        if model.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok={model.num_experts_per_tok}: topk_group={model.topk_group} of "
                f"n_group={model.n_group} leaves {reachable} experts to choose from"
            )
    _check_attention(model)
    for layer in model.mlp_only_layers:
        if layer >= model.num_hidden_layers:
            raise ValueError(
                f"mlp_only_layers={model.mlp_only_layers}: layer {layer} is past num_hidden_layers="
                f"{model.num_hidden_layers} (layers count from 0)"
            )
    if model.shared_expert_gate and not model.shared_expert_intermediate_size:
        raise ValueError("shared_expert_gate=true: there is no shared expert; set shared_expert_intermediate_size")
    return model


def _check_attention(model: ModelConfig) -> None:
    heads, kv_heads = model.num_attention_heads, model.kv_heads
    if heads % kv_heads:
        raise ValueError(
            f"num_key_value_heads={kv_heads}: must divide num_attention_heads={heads} (allowed: {divisors(heads)})"
        )
    if model.head_dim is None and model.hidden_size % heads:
        raise ValueError(f"hidden_size={model.hidden_size}: not divisible by num_attention_heads={heads}; set head_dim")
    size = model.head_size if model.kv_lora_rank is None else model.qk_rope_head_dim
    if model.rotary_size % 2 or not model.rotary_size:
        raise ValueError(
            f"head_dim={size}: must be even (rotary embedding)"
            if model.partial_rotary_factor == 1
            else f"partial_rotary_factor={model.partial_rotary_factor}: an even part of head_dim={size} is turned, not "
            f"{model.rotary_size}"
        )
    if model.rope_scaling is not None:
        scaling = check_rope_scaling(model.rope_scaling, model.max_position_embeddings, model.rotary_size)
        if scaling != model.rope_scaling:
            model.__dict__["rope_scaling"] = scaling  # past the check that is running
    if model.qkv_bias and model.attention_bias:
        raise ValueError("qkv_bias=true: attention_bias=true gives those three a bias already; one of them")
    if not model.qk_norm and not model.qk_norm_per_head:
        raise ValueError("qk_norm_per_head=false: with qk_norm=false there is no norm of queries and keys")
    if model.layer_types and len(model.layer_types) != model.num_hidden_layers:
        raise ValueError(
            f"layer_types: {len(model.layer_types)} entries; one for each of num_hidden_layers="
            f"{model.num_hidden_layers}"
        )
    if "sliding_attention" in model.layer_types and model.sliding_window is None:
        raise ValueError("layer_types: sliding_attention needs sliding_window")
    if model.kv_lora_rank is None:
        if model.q_lora_rank is not None:
            raise ValueError(f"q_lora_rank={model.q_lora_rank}: needs kv_lora_rank (multi-head latent attention)")
        return
    others = {
        "qk_norm": False,
        "qkv_bias": False,
        "clip_qkv": None,
        "attention_sinks": False,
        "head_dim": None,
        "partial_rotary_factor": 1.0,
    }
    for key, value in others.items():
        if getattr(model, key) != value:
            raise ValueError(f"{key}={getattr(model, key)}: not with kv_lora_rank (multi-head latent attention)")
    if kv_heads != heads:
        raise ValueError(f"num_key_value_heads={kv_heads}: with kv_lora_rank as many as num_attention_heads={heads}")


class ModelConfig(Section):
    """The transformer. Keys and defaults follow Hugging Face's Qwen3-MoE."""

    vocab_size: Positive = 272
    """Rows of the embedding; at least the tokenizer's size."""
    hidden_size: Positive = 512
    """Width D of the residual stream."""
    num_hidden_layers: Positive = 8
    """Number of blocks."""
    num_attention_heads: Positive = 8
    """Query heads."""
    num_key_value_heads: Positive | None = None
    """Key and value heads (grouped-query attention); default: as many as query heads."""
    head_dim: Positive | None = None
    """Width of one head; default: hidden_size / num_attention_heads."""
    intermediate_size: Positive = 1536
    """Width of the SwiGLU in layers without experts."""
    moe_intermediate_size: Positive = 512
    """Width F of the SwiGLU of one expert."""
    num_experts: NonNegative = 16
    """Experts E in each mixture-of-experts layer; 0 makes every layer dense."""
    num_experts_per_tok: Positive = 2
    """Experts K each token goes to (top-k)."""
    norm_topk_prob: bool = True
    """Divide the K chosen weights by their sum."""
    decoder_sparse_step: Positive = 1
    """Layer i has experts when (i + 1) is a multiple of this."""
    mlp_only_layers: list[NonNegative] = []
    """Layers that stay dense whatever decoder_sparse_step says."""
    shared_expert_intermediate_size: NonNegative = 0
    """Width of an expert every token passes through; 0 for none."""
    shared_expert_gate: bool = False
    """Multiply what the shared expert adds by a sigmoid of its own (Qwen2-MoE)."""
    max_position_embeddings: Positive = 4096
    """Longest sequence the positions are made for."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: dict[str, bool | int | float | str | list[float] | None] | None = None
    """How positions are stretched past those of pretraining, as in Hugging Face's rope_parameters: `rope_type` linear,
    dynamic, yarn, llama3 or longrope, and the numbers of that kind; null: not at all."""
    partial_rotary_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Part of each head that positions turn, its first elements (GLM-4.5: 0.5)."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Epsilon of every RMSNorm."""
    qk_norm: bool = True
    """RMSNorm on queries and keys (Qwen3: yes, Mixtral: no)."""
    qk_norm_per_head: bool = True
    """That norm is over each head (Qwen3), or over all heads together (false: OLMoE)."""
    attention_bias: bool = False
    """Bias in the q, k, v and output projections (as in Hugging Face's Qwen3-MoE)."""
    qkv_bias: bool = False
    """Bias in the q, k and v projections alone (Qwen2-MoE)."""
    clip_qkv: PositiveFloat | None = None
    """Clamp queries, keys and values to this size either way (OLMoE); null: not."""
    sliding_window: Positive | None = None
    """Tokens that a query sees, itself and those before it; null: all of them."""
    layer_types: list[Literal["full_attention", "sliding_attention"]] = []
    """Which layers have that window; []: all, where sliding_window is set."""
    attention_sinks: bool = False
    """A learned logit for each head that takes part in the softmax and adds nothing (gpt-oss)."""
    kv_lora_rank: Positive | None = None
    """Width of the latent from which keys and values are made (multi-head latent attention, DeepSeek-V3); null:
    grouped-query attention."""
    q_lora_rank: Positive | None = None
    """Width of the latent from which queries are made, with kv_lora_rank; null: from the residual stream."""
    qk_nope_head_dim: Positive = 128
    """With kv_lora_rank: width of a query and key head that positions do not turn."""
    qk_rope_head_dim: Positive = 64
    """With kv_lora_rank: width that they do turn, shared by all key heads."""
    v_head_dim: Positive = 128
    """With kv_lora_rank: width of a value head."""
    rope_interleave: bool = True
    """With kv_lora_rank: neighbours are turned as pairs (DeepSeek-V3), or element c with c + half."""
    attention_dropout: Probability = 0.0
    """Dropout on attention weights in training."""
    tie_word_embeddings: bool = False
    """Output head shares the embedding's weights."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of initial weights."""
    hidden_act: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Activation of the gated units; swiglu_clamped and expert classes of your own have theirs."""
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    """Router scores: softmax over all experts, or a sigmoid per expert (DeepSeek-V3)."""
    n_group: Positive = 1
    """Groups of experts for group-limited routing; 1 for none."""
    topk_group: Positive = 1
    """Groups a token may use, of n_group."""
    routed_scaling_factor: PositiveFloat = 1.0
    """Factor on the routing weights after renormalising."""
    router_bias: bool = False
    """Bias in the router's logits (gpt-oss)."""
    router: Annotated[str, RUNS_CODE] = "topk"
    """Router class: a registered name, or `package.module:Class` of your own."""
    expert: Annotated[str, RUNS_CODE] = "swiglu"
    """Expert class: a registered name, or `package.module:Class` of your own."""
    from_pretrained: PathText | None = None
    """Hugging Face model that training starts from: a folder, `org/name` or `org/name@revision` on the hub, or a URL of
    an object store; its config.json is this section, its weights the first ones (docs/pretrained.md); null: random
    weights."""
    model_type: str | None = None
    """Hugging Face family that the model came from, and that an export is written as where that can be; null: whichever
    fits."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel: PyTorch's fused one, or plain matmuls (the specification)."""

    _fits_together = model_validator(mode="after")(check_model)

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """How many elements of a head positions turn."""
        if self.kv_lora_rank is not None:
            return self.qk_rope_head_dim
        return int(self.head_size * self.partial_rotary_factor)

    def window(self, layer: int) -> int | None:
        """How many tokens a query of block `layer` sees; None for all."""
        slides = not self.layer_types or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else None

    def has_experts(self, layer: int) -> bool:
        """Whether block `layer` (from 0) is a mixture-of-experts block."""
        return (
            self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def moe_layers(self) -> list[int]:
        """Global numbers of the mixture-of-experts blocks."""
        return [layer for layer in range(self.num_hidden_layers) if self.has_experts(layer)]
