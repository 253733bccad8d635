"""A run in words: one sentence, and its layout as a small grid. Imports no torch: `moe-dist check` is instant."""

from __future__ import annotations

from moe_dist.config import Config
from moe_dist.config.sections.model import EXPERT_CHOICE
from moe_dist.models.counts import parameter_counts
from moe_dist.parallel.layout import Layout, describe


def amount(count: float) -> str:
    """A number as people say it: 5.1M, 30.5B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def byte_size(count: int) -> str:
    """Bytes as people say them: 61.9 MB, 3.2 GB; units of 1000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def sentence(
    config: Config,
    layout: Layout,
    device: str,
    num_tokens: int | None = None,
    sizes: tuple[int, int] | None = None,
) -> str:
    """What will run, in one plain sentence. `sizes`: all and active parameters, where they have been counted."""
    model, train, counts = config.model, config.train, parameter_counts(config.model)
    total, active = sizes or (counts.total, counts.active)
    batch = config.global_batch_size(layout.world_size)
    experts = (
        f"{model.num_experts} experts top-{model.num_experts_per_tok} in {len(model.moe_layers)} of "
        f"{model.num_hidden_layers} layers"
        if model.moe_layers
        else f"{model.num_hidden_layers} dense layers"
    )
    texts = {"stdlib": "the source of Python's standard library", "memory": "data given by the program"}
    source = config.data.source
    text = texts.get(source, f"what {source} gives" if ":" in source else f"{source} data")
    size = f" ({amount(num_tokens)} tokens)" if num_tokens else ""
    limits = [f"{train.max_steps} steps"] if train.max_steps > 0 else []
    if train.max_steps < 0 and train.num_train_epochs is not None:
        limits = [f"{train.num_train_epochs:g} epochs"]
    if train.max_time is not None:
        limits.append(f"{train.max_time:g} s")
    samples = "samples of 2 x" if config.learns_preferences else "sequences of"
    ranks = "1 process" if layout.world_size == 1 else f"{layout.world_size} processes"
    return (
        f"Training a {amount(total)}-parameter language model ({experts}; {amount(active)} active per "
        f"token) on {text}{size} with {ranks} on {device}, batches of {train.per_device_train_batch_size} x "
        f"{train.gradient_accumulation_steps} x {layout.dp_size} = {batch} {samples} {config.data.max_seq_length} "
        f"tokens, for {' or '.join(limits)}."
    )


def warnings_of(config: Config) -> list[str]:
    """What a person must know of what was chosen: a router that looks at later tokens, experts in float8."""
    found = []
    if config.model.router == EXPERT_CHOICE:
        found.append(
            f"model.router={EXPERT_CHOICE} is not causal: whether a token gets an expert depends on later tokens, so "
            "losses are too good and the model cannot generate as it was trained (docs/routing.md)"
        )
    if config.train.expert_precision == "fp8":
        sizes = config.model.hidden_size, config.model.moe_intermediate_size
        fits = (config.train.bf16 or config.train.pure_bf16) and not any(size % 16 for size in sizes)
        where = "by a kernel on GPUs of compute capability 9.0 (H100, H200), not measured, emulated elsewhere, slower"
        if not fits:
            where = "emulated, slower; a kernel takes them in bfloat16 alone, of sizes that are multiples of 16"
        found.append(
            "train.expert_precision=fp8 is an experiment: operands of experts' products are rounded to float8 "
            f"({where}; docs/performance.md)"
        )
    return found


def copies_line(config: Config, layout: Layout) -> str | None:
    """What copies of hot experts cost in a step, and what they must spare in turn; None without any.

    Weights come once a micro-batch and their gradients go back; a row that stays would have gone there and back in
    forward, and its gradient in backward.
    """
    model, train, count = config.model, config.train, config.parallel.replicated_experts
    if not count or layout.ep_size == 1:
        return None
    size = 2 if train.bf16 or train.pure_bf16 else 4
    numbers = 3 * model.hidden_size * model.moe_intermediate_size
    passes = train.gradient_accumulation_steps * len(model.moe_layers) / layout.pp_size
    sent = 2 * count * numbers * size * passes * (layout.ep_size - 1) / layout.ep_size
    rows = 2 * numbers * count / (4 * model.hidden_size)
    return (
        f"copies: every rank also computes the {count} hottest experts of each layer for its own tokens; a rank sends "
        f"{byte_size(round(sent))} of weights and their gradients in a step, as much as {amount(rows)} rows for them "
        "in each layer and micro-batch"
    )


def layout_lines(layout: Layout, num_experts: int) -> list[str]:
    """Which rank is where and which experts it holds, as lines of text."""
    if not num_experts or layout.world_size == 1:
        experts = f", all {num_experts} experts of every layer" if num_experts else ""
        return [f"rank 0: the whole model{experts}"] if layout.world_size == 1 else [f"dp {layout.dp_size}: no experts"]
    grid = describe(layout, num_experts)
    heads = [f"{block.start}-{block.stop - 1}" if len(block) > 1 else f"{block.start}" for block in grid.experts]
    width = max(len(f"rank {layout.world_size - 1}"), *map(len, heads)) + 2
    stages = layout.pp_size > 1
    left = max(len(_row_name(row.pp, row.edp, stages)) for row in grid.rows) + 2
    lines = ["experts".ljust(left) + "".join(head.ljust(width) for head in heads)]
    for row in grid.rows:
        cells = "".join(f"rank {rank}".ljust(width) for rank in row.ranks)
        lines.append(_row_name(row.pp, row.edp, stages).ljust(left) + cells)
    sizes = f"pp {layout.pp_size} x edp {layout.edp_size} x ep {layout.ep_size}"
    return [line.rstrip() for line in lines] + [
        f"{sizes} = {layout.world_size} ranks; dense parameters on every rank of dp {layout.dp_size}"
    ]


def _row_name(pp: int, edp: int, stages: bool) -> str:
    return f"stage {pp}, replica {edp}" if stages else f"replica {edp}"
