"""How many bytes of weights, gradients and optimizer state a rank holds: the formulas of docs/parallelism.md. No torch.

D dense parameters and E expert parameters of the layers that are on this rank's stages, N replicas over which they are
sharded: all dp of them, or `parallel.shard_size`. Between steps, that is: after an update, before the next batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_dist.config import Config, ConfigError, OptimizerConfig
from moe_dist.config.trained_weights import ChosenExperts, TrainedWeights
from moe_dist.models.counts import RankCounts, per_rank
from moe_dist.models.quantized_sizes import quantized_sizes
from moe_dist.models.trained_counts import TrainedCounts, check_trained, trained_counts
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


def trained_by_pp_rank(config: Config, chosen: ChosenExperts | None = None) -> list[TrainedCounts]:
    """For every pipeline rank the weights of its layers that are trained.

    Raises ConfigError for a pipeline rank without any, and for `train.freeze` and `train_only` that name nothing.
    """
    trained, ep_size = TrainedWeights.of(config, chosen), config.parallel.ep_size
    check_trained(config, trained)
    layers_of = [[n for layers in stages for n in layers] for stages in layers_by_pp_rank(config)]
    counts = [trained_counts(config, trained, layers, ep_size) for layers in layers_of]
    if not all(count.dense or count.experts for count in counts):
        key, way_out = f"lora.target_modules={config.lora.target_modules}", "add q_proj, or take pp_size=1"
        if not trained.are_all:
            key = (
                f"train.train_only={config.train.train_only}" if trained.only else f"train.freeze={config.train.freeze}"
            )
            way_out = "train something of its layers, move them by parallel.stages, or take pp_size=1"
        raise ConfigError(
            f"{key}: with parallel.pp_size={config.parallel.pp_size} stage "
            f"{[bool(count.dense or count.experts) for count in counts].index(False)} would have nothing to train; "
            f"{way_out}"
        )
    return counts


def state_bytes(config: Config, layout: Layout, counts: Sequence[RankCounts] | None = None) -> list[StateBytes]:
    """For every pipeline rank, what it holds. `counts`: where parameters have been counted already.

    Of weights that are frozen, beside adapters or by `train.freeze` and `train_only`, there are no gradients and no
    moments, and with `train.pure_bf16` no copies in float32; with `lora.quantize` most of them are in few bits. Of a
    stack of experts that is trained in part there is the whole gradient; moments are of those that are trained, here of
    the rank with most of them.

    Without what sharding pads, activations, communication buffers and what is gathered while a step runs.
    """
    parallel = config.parallel
    replicas = layout.dp_size if parallel.shard_size is None else parallel.shard_size
    over = replicas if parallel.zero_stage else 1
    over_experts = max(1, over // layout.ep_size)
    kept = moments(config.optimizer)
    found = []
    counts = counts or per_rank(config.model, layout, layers_by_pp_rank(config))
    for of_rank, trained in zip(counts, _trained(config, layout, counts), strict=True):
        dense, experts, moved = trained.dense, trained.experts // layout.ep_size, max(trained.moved)
        whole, part = dense + experts, dense // over + experts // over_experts
        moved_part = dense // over + moved // over_experts
        still = (0, 0) if config.lora.r else (dense, experts)
        frozen_dense, frozen_experts = of_rank.dense - still[0], of_rank.experts - still[1]
        frozen = frozen_dense + frozen_experts
        if parallel.engine == "deepspeed":
            found.append(StateBytes(4 * (frozen + whole), 4 * part, 4 * part * (1 + kept)))
        elif parallel.zero_stage == 0 and config.train.pure_bf16:
            weights = 2 * (frozen + whole + of_rank.routers)  # routers stay in float32
            masters = whole - trained.routers
            found.append(StateBytes(weights, 4 * whole, 4 * (masters + (dense + moved) * kept)))
        else:
            held = frozen_dense // over + frozen_experts // over_experts
            each = 2 if config.train.pure_bf16 else 4
            found.append(StateBytes(each * held + 4 * part, 4 * part, 4 * moved_part * kept))
        if (kind := config.lora.quantize) is not None:
            few = quantized_sizes(config.model, kind, of_rank.layers, layout.ep_size)
            less = (2 if config.train.pure_bf16 else 4) * few.numbers - few.nbytes
            found[-1] = replace(found[-1], weights=found[-1].weights - less)
    return found


def _trained(config: Config, layout: Layout, counts: Sequence[RankCounts]) -> list[TrainedCounts]:
    if config.lora.r or not TrainedWeights.of(config).are_all:
        return trained_by_pp_rank(config)
    # All of it: asked for thousands of layouts.
    blocks = layout.ep_size
    return [TrainedCounts(of.dense, of.routers, of.experts * blocks, (of.experts,) * blocks) for of in counts]
