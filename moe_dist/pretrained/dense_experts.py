"""The model without a loop or a shape that depends on the data, for exporting it: every expert computes every token.

E / K times the arithmetic of the model itself, and the same result but for rounding.
Shape suffixes: B batch, S sequence, T = B * S tokens, D hidden, F intermediate, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dist.config import ConfigError
from moe_dist.models.attention_mask import window_mask
from moe_dist.models.context import RoutingContext
from moe_dist.models.experts import ClampedExperts, ExpertList, Experts, LoopExperts
from moe_dist.models.moe import MoE
from moe_dist.models.rotary import rotary_table
from moe_dist.models.swiglu import swiglu
from moe_dist.models.transformer import Transformer


class DenseMoE(nn.Module):
    """A layer of experts in which each of them sees every token, weighted with zero where it was not chosen."""

    def __init__(self, moe: MoE) -> None:
        """Raises ConfigError for stacked experts of a class of one's own: how they compute is not known here."""
        super().__init__()
        if isinstance(moe.experts, Experts) and type(moe.experts) not in (Experts, LoopExperts, ClampedExperts):
            raise ConfigError(f"model.expert: {type(moe.experts).__name__} cannot be written as ONNX")
        self.moe = moe
        moe.router.settle_bias()  # tracing cannot look at values

    def forward(self, x_BSD: Tensor, context: RoutingContext) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        moe, x_TD = self.moe, x_BSD.flatten(0, 1)
        routing, _ = moe._route(x_TD, context, num_sequences=1)
        weights_TE = routing.weights_TK.new_zeros(1).expand(x_TD.shape[0], moe.num_experts + 1)
        weights_TE = weights_TE.scatter_add(1, routing.expert_ids_TK, routing.weights_TK)[:, : moe.num_experts]
        out_TD = (self._experts(x_TD) * weights_TE.t()[:, :, None]).sum(0)
        if moe.shared_expert is not None:
            shared_TD = moe.shared_expert(x_TD)
            if moe.shared_expert_gate is not None:
                shared_TD = moe.shared_expert_gate(x_TD).sigmoid() * shared_TD
            out_TD = out_TD + shared_TD
        return out_TD.view_as(x_BSD)

    def _experts(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (E, T, D)."""
        experts = self.moe.experts
        if isinstance(experts, ExpertList):
            return torch.stack([expert(x_TD) for expert in experts.experts.values()])
        gate_up = x_TD[None] @ experts.w_gate_up
        if isinstance(experts, ClampedExperts):
            return experts.unit(gate_up + experts.b_gate_up[:, None]) @ experts.w_down + experts.b_down[:, None]
        return swiglu(gate_up, experts.hidden_act) @ experts.w_down


class DenseTransformer(nn.Module):
    """Token ids (B, S) to logits (B, S, V), of a whole model, which is changed by this."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model, self.config = model.eval(), model.config
        for block in model.blocks():
            if block.moe is not None:
                block.moe = DenseMoE(block.moe)  # type: ignore[assignment]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Any length: a window is always a mask, also where it is wider than the sequence."""
        model, length = self.model, input_ids.shape[1]
        assert model.embed_tokens is not None
        assert model.norm is not None
        assert model.lm_head is not None
        cos, sin = rotary_table(torch.arange(length)[None], self.config)
        x_BSD = model.embed_tokens(input_ids)
        for layer, block in enumerate(model.blocks()):
            window = self.config.window(layer)
            mask = None if window is None else window_mask(length, window, input_ids.device)
            x_BSD = block(x_BSD, (cos[:, None], sin[:, None]), mask, RoutingContext())
        return model.lm_head(model.norm(x_BSD))
