"""Bugs of adapters and of frozen weights: what ranks hold of them, their gradients, noise and updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.config import LoraConfig
from moe_dist.models import grouped, initial_weights
from moe_dist.models.experts import Experts
from moe_dist.models.layers import DecomposedLowRank, Linear
from moe_dist.models.noise import Sources
from moe_dist.parallel.engines.optimizer import LogicalOptimizer, TorchEngine, local
from moe_dist.parallel.engines.replicated import ReplicatedEngine
from moe_dist.verify.injected_bugs.planting import Replace, rank


def adapter_gradient_times_ep(replace: Replace) -> None:
    """Gradients of experts' adapters, which have seen the tokens of all ep peers, are multiplied by their number."""
    reduce = ReplicatedEngine.reduce

    def wrong(self: ReplicatedEngine) -> None:
        reduce(self)
        for name, view in self.experts.views.items():
            if ".lora_" in name:
                view.mul_(self.mesh.layout.ep_size)

    replace(ReplicatedEngine, "reduce", wrong)


def adapter_b_cut_from_the_layout_of_files(replace: Replace) -> None:
    """Each rank's B is one block of columns of PEFT's (out, r * E), where the experts of a rank are not together."""
    fill = initial_weights.initialize_adapters

    def wrong(model: nn.Module, lora: LoraConfig, seed_of: Any) -> None:
        fill(model, lora, seed_of)
        for module in model.modules():
            if not isinstance(module, Experts) or module.lora_down is None:
                continue
            count = module.num_local
            for adapter in (module.lora_gate_up, module.lora_down):
                if adapter is None or count == model.config.num_experts:  # type: ignore[union-attr]
                    continue
                b = adapter.B.detach()
                b.copy_(b.permute(2, 1, 0).flatten(1).unflatten(1, (count, -1)).permute(1, 2, 0))

    replace(initial_weights, "initialize_adapters", wrong)


def adapter_dropout_by_rank(replace: Replace) -> None:
    """Dropout of experts' adapters depends on the rank that computes them."""
    mask = grouped.keep_mask

    def wrong(sources: Sources, held: Sequence[int], rows: Tensor, probability: float) -> Tensor:
        return mask(Sources(sources.rows_SE, [seed + rank() for seed in sources.seeds]), held, rows, probability)

    replace(grouped, "keep_mask", wrong)


def adapters_added_twice_in_an_evaluation(replace: Replace) -> None:
    """Merged into the weights for an evaluation, and left switched on."""
    forward = Linear.forward

    def wrong(self: Linear, x: Tensor) -> Tensor:
        out = forward(self, x)
        return out if self.training or self.lora is None else out + self.lora(x)

    replace(Linear, "forward", wrong)


def lengths_of_rows_of_a_shard(replace: Replace) -> None:
    """The lengths that magnitudes are held against are those of half the columns."""
    lengths = DecomposedLowRank.lengths

    def wrong(self: DecomposedLowRank, weight: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.arange(weight.shape[1]) < weight.shape[1] // 2
        own, _ = lengths(self, weight)
        return own, lengths(self, weight * kept)[1]

    replace(DecomposedLowRank, "lengths", wrong)


def lengths_of_rows_learn_in_a_pipeline(replace: Replace) -> None:
    """Gradients of A and B go through the lengths of rows, which the method takes for constants."""

    def wrong(self: DecomposedLowRank, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.norm(dim=1), (weight + self.scale * self.B @ self.A).norm(dim=1)

    replace(DecomposedLowRank, "lengths", wrong)


def frozen_weights_decayed_by_fsdp(replace: Replace) -> None:
    """Weight decay of what has no gradient."""
    update = LogicalOptimizer.step

    def wrong(self: LogicalOptimizer, rate: float) -> None:
        update(self, rate)
        decay = self.optimizer.param_groups[0]["weight_decay"]
        for parameter in self.engine.held_parameters().values():
            if not parameter.requires_grad:
                with torch.no_grad():
                    local(parameter.detach()).mul_(1 - rate * decay)

    replace(LogicalOptimizer, "step", wrong)


def frozen_experts_decayed(replace: Replace) -> None:
    """Weight decay of the experts of a stack that are not trained, which are beside others that are."""
    update = LogicalOptimizer.step

    def wrong(self: LogicalOptimizer, rate: float) -> None:
        update(self, rate)
        decay = self.optimizer.param_groups[0]["weight_decay"]
        for name, rows in self.still.items():
            with torch.no_grad():
                local(self.engine.held_parameters()[name].detach())[rows] *= 1 - rate * decay

    replace(LogicalOptimizer, "step", wrong)


def experts_chosen_by_their_place_here(replace: Replace) -> None:
    """Ids of experts to train are counted on each rank anew."""

    def wrong(self: LogicalOptimizer, name: str, parameter: nn.Parameter) -> dict[int, int]:
        trained = self.model.trained_in_part[name]
        return {row: row for row in range(len(local(parameter))) if row in trained}

    replace(LogicalOptimizer, "_rows", wrong)


def norm_with_frozen_experts(replace: Replace) -> None:
    """Gradients of experts that are not trained stay in the norm that the others are clipped by."""

    def wrong(self: TorchEngine) -> None:
        self._sum()

    replace(TorchEngine, "reduce", wrong)
