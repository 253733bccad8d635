"""Grouped-query causal attention. Shape suffixes: B batch, S sequence, D hidden, H heads, C head width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.models.layers import RMSNorm, rotate
from moe_dist.models.precision import full


class Attention(nn.Module):
    """Causal self-attention with fewer key/value heads than query heads (Ainslie et al. 2023, GQA)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, heads, kv_heads = config.head_size, config.num_attention_heads, config.kv_heads
        self.head_size, self.dropout = size, config.attention_dropout
        self.groups = heads // kv_heads
        self.eager = config.attn_implementation == "eager"
        self.q_proj = nn.Linear(config.hidden_size, heads * size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """(B, S, D) -> (B, S, D).

        `rotary`: cosines and sines (B or 1, 1, S, C). `mask`: None for plain causal attention, or a bool
        (B, 1, S, S), true where a query may look, which already includes causality.
        """
        batch, length, _ = x_BSD.shape
        shape = (batch, length, -1, self.head_size)
        q_BHSC = rotate(self.q_norm(self.q_proj(x_BSD).view(shape)).transpose(1, 2), *rotary)
        k_BHSC = rotate(self.k_norm(self.k_proj(x_BSD).view(shape)).transpose(1, 2), *rotary)
        v_BHSC = self.v_proj(x_BSD).view(shape).transpose(1, 2)
        if self.groups > 1:
            k_BHSC = k_BHSC.repeat_interleave(self.groups, dim=1)
            v_BHSC = v_BHSC.repeat_interleave(self.groups, dim=1)
        attend = eager_attention if self.eager else F.scaled_dot_product_attention
        dropout = self.dropout if self.training else 0.0
        out_BHSC = attend(q_BHSC, k_BHSC, v_BHSC, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        return self.o_proj(out_BHSC.transpose(1, 2).reshape(batch, length, -1))


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    """The specification of `scaled_dot_product_attention`, in plain matmuls with a float32 softmax."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    weights = full(scores).softmax(-1).to(query.dtype)
    return F.dropout(weights, dropout_p, training=dropout_p > 0) @ value
