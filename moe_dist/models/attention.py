"""Causal attention: grouped queries, or multi-head latents.

Shape suffixes: B batch, S sequence, D hidden, H heads, C head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.models.attention_mask import Attend, Documents, Mask
from moe_dist.models.cache import LayerCache
from moe_dist.models.layers import Linear, RMSNorm
from moe_dist.models.precision import full
from moe_dist.models.rotary import rotate, rotate_neighbours, score_factor


class Attention(nn.Module):
    """Causal self-attention with fewer key/value heads than query heads (Ainslie et al. 2023, GQA).

    `window`: how many tokens a query sees, itself and those before it; None for all. `sinks` (H,), where there are any:
    logits that take part in each head's softmax and add nothing (gpt-oss).
    """

    sinks: nn.Parameter | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        size, heads, kv_heads = config.head_size, config.num_attention_heads, config.kv_heads
        self.head_size, self.dropout, self.clip = size, config.attention_dropout, config.clip_qkv
        self.eager = config.attn_implementation == "eager"
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = Linear(config.hidden_size, heads * size, bias=bias)
        self.k_proj = Linear(config.hidden_size, kv_heads * size, bias=bias)
        self.v_proj = Linear(config.hidden_size, kv_heads * size, bias=bias)
        self.o_proj = Linear(heads * size, config.hidden_size, bias=config.attention_bias)
        self.norms_heads = config.qk_norm_per_head
        widths = (size, size) if self.norms_heads else (heads * size, kv_heads * size)
        self.q_norm, self.k_norm = (
            RMSNorm(width, config.rms_norm_eps) if config.qk_norm else nn.Identity() for width in widths
        )
        self.sinks = nn.Parameter(torch.empty(heads)) if config.attention_sinks else None

    def reset_parameters(self) -> None:
        """Of what is this module's own: sinks begin at zero, as one more key of average score."""
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, S, D) -> (B, S, D).

        `rotary`: cosines and sines (B or 1, 1, S, 2P). `cache`: of earlier tokens; the mask is then its own,
        (B, 1, S, L).
        """
        q_BHSC = rotate(self._heads(self.q_proj(x_BSD), self.q_norm), *rotary)
        k_BHSC = rotate(self._heads(self.k_proj(x_BSD), self.k_norm), *rotary)
        v_BHSC = self._heads(self.v_proj(x_BSD), None)
        if cache is not None:
            k_BHSC, v_BHSC = cache.extend(k_BHSC, v_BHSC)
        dropout = self.dropout if self.training else 0.0

        def attend(q_BHSC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, mask: Tensor | None) -> Tensor:
            if self.sinks is not None:
                k_BHSC, v_BHSC, mask = with_sinks(k_BHSC, v_BHSC, mask, self.sinks)
            return attention(q_BHSC, k_BHSC, v_BHSC, mask, dropout, self.eager)

        out_BHSC = by_mask(attend, q_BHSC, k_BHSC, v_BHSC, mask)
        return self.o_proj(out_BHSC.transpose(1, 2).flatten(2))

    def _heads(self, projected_BSX: Tensor, norm: nn.Module | None) -> Tensor:
        """(B, S, H * C) -> (B, H, S, C), normed and clamped as configured."""
        if norm is not None and not self.norms_heads:
            projected_BSX = norm(projected_BSX)
        if self.clip is not None:
            projected_BSX = projected_BSX.clamp(-self.clip, self.clip)
        heads = projected_BSX.unflatten(-1, (-1, self.head_size))
        if norm is not None and self.norms_heads:
            heads = norm(heads)
        return heads.transpose(1, 2)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434; V3 uses the same).

    Keys and values of all heads are made from one narrow latent of a token, and queries from another where there is
    one. Positions turn a part of each query and one key that all heads share.
    """

    NORM_EPS = 1e-6
    """Of the norms of latents, whatever the model's others have, as in `transformers`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.sizes = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
        plain, turned, value = self.sizes
        self.num_heads, self.rank, self.dropout = heads, config.kv_lora_rank, config.attention_dropout
        self.eager = config.attn_implementation == "eager"
        self.turn = rotate_neighbours if config.rope_interleave else rotate
        self.factor = score_factor(config)
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * (plain + turned), bias=False)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_norm = RMSNorm(config.q_lora_rank, self.NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * (plain + turned), bias=False)
        self.kv_a_proj = Linear(hidden, self.rank + turned, bias=config.attention_bias)
        self.kv_a_norm = RMSNorm(self.rank, self.NORM_EPS)
        self.kv_b_proj = Linear(self.rank, heads * (plain + value), bias=False)
        self.o_proj = Linear(heads * value, hidden, bias=config.attention_bias)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """As `Attention.forward`. What is kept is keys and values of all heads: made from latents again for each new
        token, they would cost more than the rest of the model."""
        plain, turned, value = self.sizes
        q_BSX = self.q_proj(x_BSD) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSD)))
        q_BHSC = q_BSX.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q_plain, q_turned = q_BHSC.split((plain, turned), dim=-1)
        latent, k_turned = self.kv_a_proj(x_BSD).split((self.rank, turned), dim=-1)
        kv_BHSX = self.kv_b_proj(self.kv_a_norm(latent)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_plain, v_BHSC = kv_BHSX.split((plain, value), dim=-1)
        k_turned = self.turn(k_turned[:, None], *rotary).expand(-1, self.num_heads, -1, -1)
        # The factor is on queries, so that both kernels scale by the same 1 / sqrt(width).
        q_BHSC = torch.cat((q_plain, self.turn(q_turned, *rotary)), dim=-1) * self.factor
        k_BHSC = torch.cat((k_plain, k_turned), dim=-1)
        if cache is not None:
            k_BHSC, v_BHSC = cache.extend(k_BHSC, v_BHSC)
        dropout = self.dropout if self.training else 0.0

        def attend(q_BHSC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, mask: Tensor | None) -> Tensor:
            return attention(q_BHSC, k_BHSC, v_BHSC, mask, dropout, self.eager)

        out_BHSC = by_mask(attend, q_BHSC, k_BHSC, v_BHSC, mask)
        return self.o_proj(out_BHSC.transpose(1, 2).flatten(2))


def build_attention(config: ModelConfig, layer: int) -> Attention | LatentAttention:
    """Of block `layer`, by the configuration."""
    return Attention(config, layer) if config.kv_lora_rank is None else LatentAttention(config, layer)


def by_mask(attend: Attend, q_BHSC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, mask: Mask) -> Tensor:
    """(B, H, S, C): all at once, or document by document."""
    if isinstance(mask, Documents):
        return mask.attend(attend, q_BHSC, k_BHSC, v_BHSC)
    return attend(q_BHSC, k_BHSC, v_BHSC, mask)


def attention(
    q_BHSC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, mask: Tensor | None, dropout: float, eager: bool
) -> Tensor:
    """(B, H, S, C) by torch's kernels, or by the specification. Of keys and values there may be fewer heads than H;
    `mask` None is causal."""
    groups = q_BHSC.shape[1] // k_BHSC.shape[1]
    # torch's kernels for groups repeat nothing; on CUDA those that take a mask know of no groups, and what is left for
    # both at once makes all scores. One new token has few.
    repeats = groups > 1 and (eager or (mask is not None and q_BHSC.is_cuda and q_BHSC.shape[2] > 1))
    if repeats:
        k_BHSC, v_BHSC = (x.repeat_interleave(groups, dim=1) for x in (k_BHSC, v_BHSC))
    if eager:
        return eager_attention(q_BHSC, k_BHSC, v_BHSC, mask, dropout, mask is None)
    return F.scaled_dot_product_attention(
        q_BHSC,
        k_BHSC,
        v_BHSC,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        enable_gqa=groups > 1 and not repeats,
    )


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    """The specification of `scaled_dot_product_attention`, in plain matmuls with a float32 softmax."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = full(scores).softmax(-1).to(query.dtype)
    return F.dropout(weights, dropout_p, training=dropout_p > 0) @ value


def with_sinks(k_BHSC: Tensor, v_BHSC: Tensor, mask: Tensor | None, sinks_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with one more of zeros in front, and a mask of numbers in which its logit is the head's sink.

    What the softmax gives to it is multiplied by a value of zeros: any kernel of attention does it.
    """
    length = k_BHSC.shape[2]
    k_BHSC, v_BHSC = F.pad(k_BHSC, (0, 0, 1, 0)), F.pad(v_BHSC, (0, 0, 1, 0))
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=k_BHSC.device).tril()
    numbers = torch.zeros_like(mask, dtype=k_BHSC.dtype).masked_fill(~mask, float("-inf"))
    sinks = sinks_H.to(k_BHSC.dtype)[None, :, None, None].expand(mask.shape[0], -1, mask.shape[-2], 1)
    return k_BHSC, v_BHSC, torch.cat((sinks, numbers.expand(-1, len(sinks_H), -1, -1)), dim=-1)
