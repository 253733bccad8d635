"""The transformer, by the names of Hugging Face."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from moe_dist.config.paths import PathText
from moe_dist.config.sections.base import (
    NonNegative,
    Positive,
    PositiveFloat,
    Probability,
    Section,
)

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
    heads, kv_heads = model.num_attention_heads, model.kv_heads
    if heads % kv_heads:
        raise ValueError(
            f"num_key_value_heads={kv_heads}: must divide num_attention_heads={heads} (allowed: {divisors(heads)})"
        )
    if model.head_dim is None and model.hidden_size % heads:
        raise ValueError(f"hidden_size={model.hidden_size}: not divisible by num_attention_heads={heads}; set head_dim")
    if model.head_size % 2:
        raise ValueError(f"head_dim={model.head_size}: must be even (rotary embedding)")
    for layer in model.mlp_only_layers:
        if layer >= model.num_hidden_layers:
            raise ValueError(
                f"mlp_only_layers={model.mlp_only_layers}: layer {layer} is past num_hidden_layers="
                f"{model.num_hidden_layers} (layers count from 0)"
            )
    return model


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
    max_position_embeddings: Positive = 4096
    """Longest sequence the positions are made for."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Epsilon of every RMSNorm."""
    qk_norm: bool = True
    """RMSNorm on each query and key head (Qwen3: yes, Mixtral: no)."""
    attention_bias: bool = False
    """Bias in the q, k, v and output projections (as in Hugging Face's Qwen3-MoE)."""
    attention_dropout: Probability = 0.0
    """Dropout on attention weights in training."""
    tie_word_embeddings: bool = False
    """Output head shares the embedding's weights."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of initial weights."""
    hidden_act: Literal["silu"] = "silu"
    """Activation of the gated units; SwiGLU only."""
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    """Router scores: softmax over all experts, or a sigmoid per expert (DeepSeek-V3)."""
    n_group: Positive = 1
    """Groups of experts for group-limited routing; 1 for none."""
    topk_group: Positive = 1
    """Groups a token may use, of n_group."""
    routed_scaling_factor: PositiveFloat = 1.0
    """Factor on the routing weights after renormalising."""
    router: str = "topk"
    """Router class: a registered name, or `package.module:Class` of your own."""
    expert: str = "swiglu"
    """Expert class: a registered name, or `package.module:Class` of your own."""
    from_pretrained: PathText | None = None
    """Folder of a Hugging Face model that training starts from: its config.json is this section, its weights the first
    ones (docs/pretrained.md); null: random weights."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel: PyTorch's fused one, or plain matmuls (the specification)."""

    _fits_together = model_validator(mode="after")(check_model)

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def has_experts(self, layer: int) -> bool:
        """Whether block `layer` (from 0) is a mixture-of-experts block."""
        return (
            self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def moe_layers(self) -> list[int]:
        """Global numbers of the mixture-of-experts blocks."""
        return [layer for layer in range(self.num_hidden_layers) if self.has_experts(layer)]
