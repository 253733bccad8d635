"""One layer of the language model: attention, then experts or a dense feed-forward.

Shape suffixes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.attention import build_attention
from moe_dist.models.attention_mask import Mask
from moe_dist.models.cache import LayerCache
from moe_dist.models.context import RoutingContext
from moe_dist.models.layers import RMSNorm, SwiGLU
from moe_dist.models.moe import MoE
from moe_dist.models.recompute import recompute


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + feed-forward(norm(x)), experts or dense."""

    def __init__(self, config: ModelConfig, balance: BalanceConfig, layer: int) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = build_attention(config, layer)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = MoE(config, balance, layer) if config.has_experts(layer) else None
        self.mlp = None if self.moe else SwiGLU(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.recompute = "none"
        self.is_compiled = False

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        context: RoutingContext,
        cache: LayerCache | None = None,
    ) -> Tensor:
        if self.recompute == "full" and torch.is_grad_enabled():
            return recompute(self._forward, x_BSD, rotary, mask, context)
        return self._forward(x_BSD, rotary, mask, context, cache)

    def _forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        context: RoutingContext,
        cache: LayerCache | None = None,
    ) -> Tensor:
        if self.recompute == "selective" and torch.is_grad_enabled():
            x_BSD = recompute(self.attend, x_BSD, rotary, mask)
        else:
            x_BSD = self.attend(x_BSD, rotary, mask, cache)
        if self.moe is not None:
            return x_BSD + self.moe(self.post_attention_norm(x_BSD), context)
        return self.feed_forward(x_BSD)

    def attend(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        cache: LayerCache | None = None,
    ) -> Tensor:
        return x_BSD + self.attention(self.input_norm(x_BSD), rotary, mask, cache)

    def feed_forward(self, x_BSD: Tensor) -> Tensor:
        assert self.mlp is not None
        return x_BSD + self.mlp(self.post_attention_norm(x_BSD))

    def compile_dense(self) -> None:
        """Compile what has static shapes: attention, and the feed-forward of a block without experts."""
        self.is_compiled = True
        self.attend = torch.compile(self.attend)  # type: ignore[method-assign]
        self.feed_forward = torch.compile(self.feed_forward)  # type: ignore[method-assign]
