"""Seconds of an optimizer step on the slowest rank of a layout, by what they are spent on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from moe_dist.config import Config
from moe_dist.models.counts import RankCounts, blocks
from moe_dist.parallel.dispatch_choice import (
    chosen_dispatcher,
    ranks_on_a_host,
    rows_between_hosts,
    rows_per_token,
)
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.state_bytes import state_bytes
from moe_dist.plan.activations import Activations, Widths, block_activations
from moe_dist.plan.cluster import Cluster
from moe_dist.plan.imbalance import rank_load
from moe_dist.plan.links import Group, exchange, group_of, half_all_reduce, send


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; they add up."""

    compute: float
    imbalance: float
    """More computing on the busiest rank than on the mean one."""
    dispatch: float
    """All-to-all of the experts."""
    bubble: float
    pipeline: float
    """Messages between stages."""
    sharding: float
    """Gathering weights and reducing gradients, where nothing hides it."""
    update: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class _Pass:
    """Seconds of one block or of a stage for one micro-batch: forward, backward by inputs and by weights."""

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0
    uneven: float = 0.0
    """Of all of these: what the busiest rank has more than the mean."""
    dispatch: float = 0.0

    def times(self, count: float) -> _Pass:
        return _Pass(*(getattr(self, field.name) * count for field in fields(self)))

    def __add__(self, other: _Pass) -> _Pass:
        return _Pass(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def total(self) -> float:
        return self.forward + self.inputs + self.weights + self.uneven + self.dispatch


def step_time(
    config: Config, layout: Layout, counts: Sequence[RankCounts], cluster: Cluster, imbalance: float
) -> StepTime:
    """Of this layout. Arguments as of `memory.peak_memory`."""
    model, parallel = config.model, config.parallel
    num_micro = config.train.gradient_accumulation_steps
    kinds = {has: _block(config, layout, has, cluster, imbalance) for has in _kinds(config)}
    head = _head(config, cluster)
    stages = []
    for of_rank in counts:
        num_moe = sum(model.has_experts(layer) for layer in of_rank.layers)
        total = kinds.get(True, _Pass()).times(num_moe)
        total += kinds.get(False, _Pass()).times(len(of_rank.layers) - num_moe)
        stages.append(total + head if model.num_hidden_layers - 1 in of_rank.layers else total)
    slowest = max(stages, key=lambda stage: stage.total)
    at_once = _waits(config, layout, cluster)
    bubble = _bubble(parallel.schedule, layout.pp_size, parallel.stages_per_rank, slowest)
    backward = slowest.inputs + slowest.weights
    return StepTime(
        num_micro * (slowest.forward + backward),
        num_micro * slowest.uneven,
        num_micro * slowest.dispatch,
        bubble,
        at_once * (num_micro * (1 - cluster.overlap) + layout.pp_size - 1),
        _sharding(config, layout, counts, cluster, slowest.forward, backward),
        _update(config, layout, counts, cluster),
    )


def _kinds(config: Config) -> list[bool]:
    model = config.model
    return sorted({model.has_experts(layer) for layer in range(model.num_hidden_layers)})


def _block(config: Config, layout: Layout, has_experts: bool, cluster: Cluster, imbalance: float) -> _Pass:
    model, train = config.model, config.train
    tokens = train.per_device_train_batch_size * config.rows_per_sample * config.data.max_seq_length
    layer = next(i for i in range(model.num_hidden_layers) if model.has_experts(i) is has_experts)
    part = blocks(model, [layer])[0]
    peak = cluster.peak_bf16 if Widths.of(config).w == 2 else cluster.peak_float32
    dense = 2 * tokens * part.multiplying / (peak * gemm_share(cluster, tokens))
    attention = _attention_flops(config, layer, cluster.device) * tokens / (peak * cluster.attention_efficiency)
    attention_weights = 2 * tokens * part.attention / (peak * gemm_share(cluster, tokens))
    load = rank_load(config, layout.ep_size, imbalance)
    experts = 0.0
    if has_experts:
        rows = tokens * model.num_experts_per_tok * layout.ep_size / model.num_experts  # of one expert of this rank
        work = 2 * tokens * model.num_experts_per_tok * part.experts / model.num_experts
        experts = work / (peak * cluster.grouped_efficiency * rows / (rows + cluster.grouped_rows))
        # Weights are read once however few rows there are.
        read = Widths.of(config).w * part.experts / layout.ep_size / cluster.memory_bandwidth
        experts = max(experts, read)
    whole: Activations = block_activations(config, has_experts, tokens, cluster.device, load, "none")
    # What is kept passes through several elementwise kernels on its way, each reading and writing.
    moved = 4 * whole.kept / cluster.memory_bandwidth
    # With experts the host waits for the device once a layer: its launches do not run ahead, and are not hidden.
    launches = cluster.layer_overhead
    work = dense + attention + experts + moved
    forward = work + launches if has_experts else max(work, launches)
    backward = max(2 * (dense + attention + experts) + 2 * moved, 2 * cluster.layer_overhead)
    again = {"none": 0.0, "selective": attention + attention_weights + moved / 2, "full": forward}
    repeated = again[train.gradient_checkpointing]
    splits = config.parallel.schedule in ("zero_bubble", "dualpipe_v") and layout.pp_size > 1
    by_weights = (dense + experts) if splits else 0.0
    inputs = backward - by_weights + (experts if splits else 0.0) + repeated  # expert kernels compute both each time
    passes = 4 if train.gradient_checkpointing == "full" else 3
    uneven = (load - 1) * experts * passes
    times = 6 if train.gradient_checkpointing == "full" else 4
    first = config.balance.aux_loss_scope == "global_batch" and train.gradient_accumulation_steps > 1
    more = int(first and bool(config.balance.aux_loss_coef))
    more += int(config.learns_preferences and config.dpo_reference == "base")  # without adapters, in every step
    forward, times = (1 + more) * forward, times + 2 * more
    if not has_experts or layout.ep_size == 1:
        return _Pass(forward, inputs, by_weights, uneven)
    pieces = config.parallel.dispatch_chunks
    travel = times * pieces * _one_way(config, layout, tokens / pieces, load, cluster)
    # All pieces but one travel beside experts, and each further one adds up the gradients of their weights again.
    travel -= min((1 - 1 / pieces) * travel, cluster.overlap * passes * experts)
    again_added = (pieces - 1) * 3 * 4 * part.experts / layout.ep_size / cluster.memory_bandwidth
    return _Pass(forward, inputs + again_added, by_weights, uneven, travel)


def gemm_share(cluster: Cluster, rows: float) -> float:
    """Share of the peak that a matrix product of so many rows reaches."""
    return cluster.gemm_efficiency * rows / (rows + cluster.gemm_rows)


def _attention_flops(config: Config, layer: int, device: str) -> float:
    """Of scores and sums forward, for one token: all of a sequence where there is a mask, half without. Of documents
    attended to one by one that is the most it can be: how long they are is not known."""
    model, length = config.model, config.data.max_seq_length
    width = 2 * model.head_size
    if model.kv_lora_rank is not None:
        width = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    whole = 2 * model.num_attention_heads * width * length
    masked = (config.data.document_mask and device != "cpu") or model.window(layer) is not None
    return whole if masked else whole / 2


def _one_way(config: Config, layout: Layout, tokens: float, load: float, cluster: Cluster) -> float:
    """Seconds of one all-to-all of the rows of so many tokens, to the busiest rank."""
    model = config.model
    here = min(cluster.devices_per_host, layout.world_size)
    name, _ = chosen_dispatcher(config, here)
    row = tokens * model.hidden_size * Widths.of(config).w * load
    there = ranks_on_a_host(config, here)
    if name == "hierarchical" and there is not None:
        hosts = layout.ep_size // there
        _, out = rows_between_hosts(model.num_experts_per_tok, layout.ep_size, there)
        # A host hands on to each of its ranks with an expert what came from outside and what is its own.
        inside = hosts * (there - 1) * (1 - (1 - 1 / layout.ep_size) ** model.num_experts_per_tok)
        seconds = exchange(Group(hosts, 1), row * out, cluster)
        return seconds + exchange(Group(there, there), row * inside, cluster)
    pairs, once = rows_per_token(model.num_experts_per_tok, layout.ep_size)
    rows = {"dedup": once, "deepep": once, "all_gather": layout.ep_size - 1.0}.get(name, pairs)
    return exchange(group_of(layout, "ep", cluster.devices_per_host), row * rows, cluster)


def _head(config: Config, cluster: Cluster) -> _Pass:
    model = config.model
    tokens = config.train.per_device_train_batch_size * config.rows_per_sample * config.data.max_seq_length
    peak = cluster.peak_bf16 if Widths.of(config).w == 2 else cluster.peak_float32
    product = 2 * tokens * model.hidden_size * model.vocab_size / (peak * gemm_share(cluster, tokens))
    moved = 12 * tokens * model.vocab_size / cluster.memory_bandwidth
    splits = config.parallel.schedule in ("zero_bubble", "dualpipe_v") and config.parallel.pp_size > 1
    by_weights = product if splits else 0.0
    return _Pass(product + moved, 2 * product + moved - by_weights, by_weights)


def _waits(config: Config, layout: Layout, cluster: Cluster) -> float:
    """Seconds of the messages of one micro-batch between stages, forward and backward."""
    if layout.pp_size == 1:
        return 0.0
    tokens = config.train.per_device_train_batch_size * config.rows_per_sample * config.data.max_seq_length
    crosses = layout.dp_size >= cluster.devices_per_host or layout.world_size > cluster.devices_per_host
    size = tokens * config.model.hidden_size * Widths.of(config).r
    return 2 * config.parallel.stages_per_rank * send(crosses, size, cluster)


def _bubble(schedule: str, pp_size: int, stages_per_rank: int, stage: _Pass) -> float:
    """Idle seconds of a rank in one step, as docs/parallelism.md has them."""
    if pp_size == 1:
        return 0.0
    forward, inputs, weights = stage.forward, stage.inputs, stage.weights
    extra = stage.dispatch + stage.uneven
    if schedule == "zero_bubble":
        return (pp_size - 1) * max(0.0, forward + inputs - 2 * weights + extra)
    if schedule == "dualpipe_v":
        return (pp_size - 1) / 2 * max(0.0, forward + 2 * inputs - weights + extra)
    return (pp_size - 1) * (forward + inputs + weights + extra) / (stages_per_rank if "inter" in schedule else 1)


def _sharding(
    config: Config, layout: Layout, counts: Sequence[RankCounts], cluster: Cluster, forward: float, backward: float
) -> float:
    parallel, num_micro = config.parallel, config.train.gradient_accumulation_steps
    if layout.dp_size == 1:
        return 0.0
    width = 2 if config.train.pure_bf16 else 4
    largest = max(counts, key=lambda of_rank: of_rank.total)
    shard = parallel.shard_size or layout.dp_size
    per_host = cluster.devices_per_host
    travels = 2 if parallel.reduce_dtype == "bfloat16" else 4
    num_moe = sum(config.model.has_experts(layer) for layer in largest.layers)

    def pieces(size: float, units: int) -> int:
        """Collectives: of FSDP one for each unit that it wraps, else one for each bucket."""
        if parallel.zero_stage and parallel.engine == "torch":
            return units
        return math.ceil(travels * size / (parallel.bucket_cap_mb * 2**20))

    dense = largest.dense if parallel.zero_stage else _summed_whole(config, layout, largest)
    groups = [
        (
            dense,
            group_of(layout, "dp", per_host, shard if parallel.zero_stage else None),
            layout.dp_size // shard,
            pieces(dense, len(largest.layers) + num_moe + 1),  # blocks, routers, and the stage itself
        ),
        (
            largest.experts,
            group_of(layout, "edp", per_host, max(1, shard // layout.ep_size) if parallel.zero_stage else None),
            layout.edp_size // max(1, shard // layout.ep_size),
            pieces(largest.experts, num_moe),
        ),
    ]
    reduced = sum(half_all_reduce(group, travels * size, cluster, count) for size, group, _, count in groups)
    gathered = sum(half_all_reduce(group, width * size, cluster, count) for size, group, _, count in groups)
    across = sum(
        2 * half_all_reduce(Group(copies, 1), travels * size / group.size, cluster)
        for size, group, copies, _ in groups
        if parallel.zero_stage and copies > 1
    )
    stage, pipelined = parallel.zero_stage, layout.pp_size > 1
    if stage == 0:  # buckets travel beside backward of the last micro-batch
        hides = parallel.overlap_grad_reduce and parallel.stages_per_rank == 1 and parallel.engine == "torch"
        return 2 * reduced - (min(2 * reduced, cluster.overlap * backward) if hides else 0.0)
    reduced *= cluster.reduce_scatter_cost
    if parallel.engine == "deepspeed":
        return gathered + 2 * reduced * (num_micro if stage == 2 else 1)
    if pipelined:
        return reduced + gathered * (num_micro + 1 if stage == 3 else 1) + across
    gathers, reduces = {1: (1, 1), 2: (1, num_micro), 3: (2 * num_micro, num_micro)}[stage]
    by_forward = gathers / 2 if stage == 3 else gathers
    hidden_forward = min(by_forward * gathered, cluster.overlap * forward * (by_forward if stage == 3 else 1))
    there = reduces * reduced + (gathers - by_forward) * gathered
    hidden_backward = min(there, cluster.overlap * backward * (num_micro if stage > 1 else 1))
    return (by_forward * gathered - hidden_forward) + (there - hidden_backward) + across


def _summed_whole(config: Config, layout: Layout, stage: RankCounts) -> int:
    """Dense gradients of stage 0 as many numbers as an all-reduce would take as long for: of the embedding rows of seen
    tokens are gathered, where they are few (`parallel/engines/row_sum.py`), and each travels once instead of twice."""
    model, travels = config.model, config.parallel.embedding_grad_reduce
    if 0 not in stage.layers or model.tie_word_embeddings or travels == "whole":
        return stage.dense
    train = config.train
    tokens = train.per_device_train_batch_size * train.gradient_accumulation_steps * config.data.max_seq_length
    rows = layout.dp_size * min(tokens, model.vocab_size)
    if rows > model.vocab_size and travels == "auto":
        return stage.dense
    return stage.dense + (rows // 2 - model.vocab_size) * model.hidden_size


def _update(config: Config, layout: Layout, counts: Sequence[RankCounts], cluster: Cluster) -> float:
    """Norm, clipping and the optimizer read and write what a rank holds."""
    largest = max(state_bytes(config, layout, counts), key=lambda state: state.total)
    return (2 * largest.total + largest.gradients * 3) / cluster.memory_bandwidth
