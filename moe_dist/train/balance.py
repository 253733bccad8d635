"""Balancing across ranks: what must know the whole global batch.

Shape suffixes: L mixture-of-experts layers, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.models.auxiliary import LoadFacts
from moe_dist.models.context import Load
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh


class Balancer:
    """Load facts of all layers, and the selection bias of auxiliary-loss-free balancing (Wang et al. 2024).

    The bias moves once per optimizer step, from int64 counts of what the router wanted (before any drop), summed
    over all ranks that hold tokens: +rate for experts below the layer's mean, -rate above.
    """

    def __init__(self, model: Transformer, mesh: Mesh, bias_update_rate: float, num_domains: int = 0) -> None:
        self.mesh = mesh
        self.layers = {moe.layer: moe for moe in model.moe_layers()}
        self.rates = dict.fromkeys(self.layers, bias_update_rate)
        for moe in self.layers.values():
            moe.balance.count_from_now_on(mesh.device, num_domains)

    @property
    def facts(self) -> dict[int, LoadFacts]:
        """What each layer has recorded since `clear`, on this rank only."""
        return {layer: moe.balance.facts for layer, moe in self.layers.items() if moe.balance.facts is not None}

    def clear(self) -> None:
        for facts in self.facts.values():
            facts.zero_()

    def global_pairs(self) -> Tensor:
        """Pairs per layer and expert over the global batch, (L, E) int64; this rank's facts stay untouched."""
        return self.mesh.sum_over("dp", torch.stack([facts.pairs_E for facts in self.facts.values()]))

    def take_global_load(self) -> dict[int, Load]:
        """Of what a first pass over all micro-batches has recorded: the load that every layer's loss uses, by layer."""
        if not self.layers:  # a pipeline stage without experts
            return {}
        facts = list(self.facts.values())
        tokens = torch.stack([layer.tokens for layer in facts])
        packed = torch.cat((torch.stack([layer.pairs_E for layer in facts]), tokens[:, None]), dim=1)
        packed = self.mesh.sum_over("dp", packed)
        self.clear()
        return {layer: (row[None, :-1], row[-1:]) for row, layer in zip(packed, self.layers, strict=True)}

    @torch.no_grad()
    def update_bias(self) -> None:
        """Move every layer's selection bias by one step, the same way on every rank."""
        if not any(self.rates.values()):
            return
        for pairs_E, (layer, moe) in zip(self.global_pairs(), self.layers.items(), strict=True):
            # mean - count, in integers: E * count against the sum, so that no unit is lost to rounding.
            direction = (pairs_E.sum() - pairs_E * pairs_E.numel()).sign()
            moe.router.bias_E += self.rates[layer] * direction
