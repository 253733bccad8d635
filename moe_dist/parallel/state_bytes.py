"""How many bytes of weights, gradients and optimizer state a rank holds: the formulas of docs/parallelism.md. No torch.

D dense parameters and E expert parameters of the layers that are on this rank's stages, N replicas over which they are
sharded: all dp of them, or `parallel.shard_size`. Between steps, that is: after an update, before the next batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.config import Config, ConfigError, OptimizerConfig
from moe_dist.models.adapter_shapes import adapter_counts
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


def adapters_of_places(config: Config) -> list[tuple[int, int]]:
    """For every place in the pipeline the weights of its layers' adapters: outside experts, of all experts.

    Raises ConfigError for a place without any: it would have nothing to train.
    """
    if not config.lora.r:
        return [(0, 0)] * config.parallel.pp_size
    places = layers_by_pp_rank(config)
    counts = [adapter_counts(config.model, config.lora, [n for layers in stages for n in layers]) for stages in places]
    if not all(map(any, counts)):
        raise ConfigError(
            f"lora.target_modules={config.lora.target_modules}: with parallel.pp_size={config.parallel.pp_size} stage "
            f"{[any(count) for count in counts].index(False)} would have nothing to train; add q_proj, or take "
            "pp_size=1"
        )
    return counts


def state_bytes(config: Config, layout: Layout, places: Sequence[RankCounts] | None = None) -> list[StateBytes]:
    """For every place in the pipeline, what each of its ranks holds. `places`: where they have been counted already.

    Beside adapters the model is frozen: of its weights there are no gradients and no moments, and with
    `train.pure_bf16` no copies in float32.

    Without what sharding pads, activations, communication buffers and what is gathered while a step runs.
    """
    parallel = config.parallel
    replicas = layout.dp_size if parallel.shard_size is None else parallel.shard_size
    over = replicas if parallel.zero_stage else 1
    over_experts = max(1, over // layout.ep_size)
    kept = moments(config.optimizer)
    found = []
    places = places or per_rank(config.model, layout, layers_by_pp_rank(config))
    for place, (dense, experts) in zip(places, adapters_of_places(config), strict=True):
        whole, part = place.total, place.dense // over + place.experts // over_experts
        frozen = 0
        if config.lora.r:
            experts //= layout.ep_size
            frozen, whole, part = whole, dense + experts, dense // over + experts // over_experts
        if parallel.engine == "deepspeed":
            found.append(StateBytes(4 * (frozen + whole), 4 * part, 4 * part * (1 + kept)))
        elif parallel.zero_stage == 0 and config.train.pure_bf16:
            rounded = whole if frozen else whole - place.routers
            weights = 2 * (frozen + whole + place.routers)  # routers stay in float32
            found.append(StateBytes(weights, 4 * whole, 4 * (rounded + whole * kept)))
        else:
            if frozen:
                frozen = place.dense // over + place.experts // over_experts
            each = 2 if config.train.pure_bf16 else 4
            found.append(StateBytes(each * frozen + 4 * part, 4 * part, 4 * part * kept))
    return found
