"""How many bytes of weights, gradients and optimizer state a rank holds: the formulas of docs/parallelism.md. No torch.

D dense parameters and E expert parameters of the layers that are on this rank's stages, N replicas over which they are
sharded: all dp of them, or `parallel.shard_size`. Between steps, that is: after an update, before the next batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.config import Config, OptimizerConfig
from moe_dist.models.counts import RankCounts, per_rank
from moe_dist.parallel.layout import Layout, layers_by_pp_rank

_MOMENTS = {"adamw_torch_fused": 2, "adamw_torch": 2, "sgd": 1, "adafactor": 0}


def moments(optimizer: OptimizerConfig) -> int:
    """Float32 numbers that the optimizer keeps for each parameter. Adafactor's row and column means are not counted."""
    return 0 if optimizer.optim == "sgd" and not optimizer.momentum else _MOMENTS[optimizer.optim]


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank. `optimizer`: moments, and float32 copies of weights where there are some."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(config: Config, layout: Layout, places: Sequence[RankCounts] | None = None) -> list[StateBytes]:
    """For every place in the pipeline, what each of its ranks holds. `places`: where they have been counted already.

    Without what sharding pads, activations, communication buffers and what is gathered while a step runs.
    """
    parallel = config.parallel
    replicas = layout.dp_size if parallel.shard_size is None else parallel.shard_size
    over = replicas if parallel.zero_stage else 1
    over_experts = max(1, over // layout.ep_size)
    kept = moments(config.optimizer)
    found = []
    for place in places or per_rank(config.model, layout, layers_by_pp_rank(config)):
        whole, part = place.total, place.dense // over + place.experts // over_experts
        if parallel.engine == "deepspeed":
            found.append(StateBytes(4 * whole, 4 * part, 4 * part * (1 + kept)))
        elif parallel.zero_stage == 0 and config.train.pure_bf16:
            rounded = whole - place.routers
            found.append(StateBytes(4 * whole - 2 * rounded, 4 * whole, 4 * (rounded + whole * kept)))
        else:
            found.append(StateBytes(4 * part, 4 * part, 4 * part * kept))
    return found
