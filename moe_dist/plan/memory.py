"""Bytes on the most loaded rank of a layout at the worst moment of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from moe_dist.config import Config
from moe_dist.models.counts import RankCounts
from moe_dist.models.quantized_sizes import quantized_sizes
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.state_bytes import StateBytes, state_bytes
from moe_dist.plan.activations import Activations, Widths, block_activations, head_activations, shared_bytes
from moe_dist.plan.imbalance import rank_load


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by what they are for; they add up to the peak."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    """Weights and gradients that sharding has whole for a while, and weights in few bits for a product."""
    activations: float
    """Kept for backward, of all micro-batches in flight."""
    logits: float
    """Head and loss, and copies of weights until then, where they need more than a block does later."""
    working: float
    """What one block needs for a moment."""
    dispatch: float
    """Buffers of rows on their way."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def in_flight(schedule: str, pp_size: int, micro_batches: int, stages_per_rank: int, pp_rank: int) -> float:
    """Micro-batches whose activations a rank keeps at most, in units of what all its layers keep for one."""
    if pp_size == 1:
        return 1.0
    kept = {
        "gpipe": float(micro_batches),
        "1f1b": float(pp_size - pp_rank),
        "interleaved_1f1b": pp_size + (pp_size - 1) / stages_per_rank - 2 * pp_rank / stages_per_rank,
        "zero_bubble": float(pp_size),
        "dualpipe_v": pp_size + 0.5,
    }[schedule]
    return max(1.0 / stages_per_rank, min(kept, float(micro_batches)))


def peak_memory(config: Config, layout: Layout, counts: Sequence[RankCounts], imbalance: float, device: str) -> Memory:
    """Of the most loaded rank. `counts`: parameters of each pipeline rank, as `counts.per_rank` has them;
    `imbalance`: rows of the busiest expert as multiples of the mean; `device`: cpu or another.
    """
    model, train = config.model, config.train
    tokens = train.per_device_train_batch_size * config.rows_per_sample * config.data.max_seq_length
    load = rank_load(config, layout.ep_size, imbalance)
    has_dense = len(model.moe_layers) < model.num_hidden_layers
    kinds = {
        has: block_activations(config, has, tokens, device, load)
        for has in (True, False)
        if (model.moe_layers if has else has_dense)
    }
    head = head_activations(config, tokens, device)
    states = state_bytes(config, layout, counts)
    found = [
        _of_pp_rank(config, layout, of_rank, state, kinds, head, tokens, load, device)
        for of_rank, state in zip(counts, states, strict=True)
    ]
    return max(found, key=lambda memory: memory.total)


def _of_pp_rank(
    config: Config,
    layout: Layout,
    of_rank: RankCounts,
    state: StateBytes,
    kinds: dict[bool, Activations],
    head: Activations,
    tokens: int,
    load: float,
    device: str,
) -> Memory:
    model, parallel, train = config.model, config.parallel, config.train
    flying = in_flight(
        parallel.schedule,
        layout.pp_size,
        train.gradient_accumulation_steps,
        parallel.stages_per_rank,
        of_rank.stage,
    )
    num_moe = sum(model.has_experts(layer) for layer in of_rank.layers)
    num_dense = len(of_rank.layers) - num_moe
    kept = (num_moe * kinds[True].kept if num_moe else 0.0) + (num_dense * kinds[False].kept if num_dense else 0.0)
    working = max([kinds[has].passing for has, number in ((True, num_moe), (False, num_dense)) if number] or [0.0])
    is_last = model.num_hidden_layers - 1 in of_rank.layers
    # When the forward pass ends; gone by the time blocks run backward.
    cached = sum(number * kinds[has].cached for has, number in ((True, num_moe), (False, num_dense)) if number)
    logits = max(0.0, cached + (head.kept + head.passing if is_last else 0.0) - working)
    travels = 0.0
    if layout.ep_size > 1 and num_moe:
        travels = 2 * load * tokens * model.num_experts_per_tok * Widths.of(config).w * model.hidden_size
    return Memory(
        state.weights,
        state.gradients,
        state.optimizer,
        _gathered(config, layout, of_rank, state),
        kept * flying + shared_bytes(config, tokens, device) * min(flying, train.gradient_accumulation_steps),
        logits,
        working,
        travels,
    )


def _gathered(config: Config, layout: Layout, of_rank: RankCounts, state: StateBytes) -> float:
    """What is whole beside the shards, or of weights in few bits the largest.

    Weights: of stages 1 and 2 all from the first forward pass on; of 3 two blocks, or with a pipeline all that a rank
    has. Gradients: of stage 1, and with a pipeline, all while micro-batches add up, which become shards block by block
    and then are gone; else those of one block.
    """
    stage, parallel = config.parallel.zero_stage, config.parallel
    if (kind := config.lora.quantize) is not None:
        each = 2 if config.train.pure_bf16 or config.train.bf16 else 4
        return each * quantized_sizes(config.model, kind, of_rank.layers, layout.ep_size).largest
    if not stage or (layout.dp_size == 1):
        return 0.0
    if parallel.engine == "deepspeed":
        return 0.0
    width = 2 if config.train.pure_bf16 else 4
    block = of_rank.total / max(1, len(of_rank.layers))
    if stage == 3 and layout.pp_size == 1:
        return block * (2 * width + 4)
    whole = of_rank.total * width
    if layout.pp_size > 1 or (stage == 1 and config.train.gradient_accumulation_steps > 1):
        return whole + max(4 * block, 4 * (of_rank.total + block) - state.gradients)
    return whole + 4 * block
