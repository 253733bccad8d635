"""What `moe-dist check` prints."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_dist.config import Config
from moe_dist.config.trained_weights import TrainedWeights
from moe_dist.models.adapter_shapes import adapter_counts, trainable_line
from moe_dist.models.adapter_shapes import sentence as sentence_of_adapters
from moe_dist.models.counts import flops_per_token, parameter_counts, per_rank
from moe_dist.models.shapes import STACKED, decays
from moe_dist.models.trained_counts import trainable_shapes, trained_counts, trained_sentence
from moe_dist.parallel.dispatch_choice import chosen_dispatcher
from moe_dist.parallel.layout import Axis, Layout, layers_by_pp_rank
from moe_dist.parallel.state_bytes import state_bytes
from moe_dist.plan.activations import layer_activations
from moe_dist.plan.machine import device_kind
from moe_dist.train.run_summary import amount, byte_size, copies_line, layout_lines, sentence, warnings_of

_MEANING: dict[Axis, str] = {
    "ep": "share out the experts of every layer",
    "edp": "hold the same experts",
    "dp": "hold the same dense parameters, see different data",
    "pp": "hold successive stages",
}


def print_report(config: Config, world_size: int, console: Console | None = None) -> None:
    """Sentence, grid of ranks, groups, parameters, bytes. Raises ConfigError when the layout is impossible."""
    console = console or Console(highlight=False)
    layout = Layout.of(config, world_size)
    counts = parameter_counts(config.model)
    console.print(sentence(config, layout, config.launch.device.replace("auto", "CPU or CUDA")))
    console.print()
    for warning in warnings_of(config):
        console.print(warning, soft_wrap=True)
        console.print()
    for line in layout_lines(layout, config.model.num_experts):
        console.print(f"  {line}", soft_wrap=True)
    dispatcher, why = chosen_dispatcher(config, min(config.launch.nproc_per_node, world_size))
    if layout.ep_size > 1:
        console.print(f"  dispatcher: {dispatcher}{f' ({why})' if why else ''}", soft_wrap=True, markup=False)
    if (copies := copies_line(config, layout)) is not None:
        console.print(f"  {copies}", soft_wrap=True, markup=False)
    console.print()
    groups = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    for column in ("axis", "size", "groups of ranks", "ranks of a group ..."):
        groups.add_column(column, header_style="dim", overflow="fold")
    for axis, meaning in _MEANING.items():
        members = layout.groups(axis)
        shown = " ".join(_group(group) for group in members[:8])
        more = f" ... {len(members)} groups" if len(members) > 8 else ""
        groups.add_row(axis, str(len(members[0])), escape(shown + more), meaning)
    console.print(groups)
    console.print()
    trained, adapters = TrainedWeights.of(config), sum(adapter_counts(config.model, config.lora))
    lines = [sentence_of_adapters(config.model, config.lora)] if config.lora.r else []
    lines += [] if trained.are_all else [trained_sentence(config, trained)]
    if lines:
        lines.append(trainable_line(trained_counts(config, trained).total, counts.total + adapters))
        console.print("\n".join(f"  {line}" for line in lines), soft_wrap=True, markup=False)
        console.print()
    numbers = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
    numbers.add_row("parameters", f"{counts.total:,}", amount(counts.total))
    numbers.add_row(
        "active per token",
        f"{counts.active:,}",
        f"{amount(counts.active)}, {100 * counts.active / counts.total:.1f} %",
    )
    layers_of = layers_by_pp_rank(config)
    held = state_bytes(config, layout)
    for stage, ranges, state in zip(per_rank(config.model, layout, layers_of), layers_of, held, strict=True):
        name = "on each rank" if layout.pp_size == 1 else f"on each rank of stage {stage.stage}"
        parts = f"{amount(stage.total)}: {amount(stage.dense)} dense, {amount(stage.experts)} in experts"
        if layout.pp_size > 1:
            parts = f"layers {', '.join(_layers(layers) for layers in ranges)}; {parts}"
        numbers.add_row(name, f"{stage.total:,}", parts)
        kinds = ", ".join(f"{byte_size(getattr(state, kind))} {kind}" for kind in ("weights", "gradients", "optimizer"))
        numbers.add_row("  bytes of it", f"{state.total:,}", f"{byte_size(state.total)}: {kinds}")
    for name, needed in layer_activations(config, device_kind(config)).items():
        kept, passing = byte_size(round(needed.kept)), byte_size(round(needed.passing + needed.cached))
        what = f"{kept} of a micro-batch kept for backward, {passing} more for a moment"
        numbers.add_row(f"activations, {name}", f"{round(needed.kept):,}", what)
    flops = flops_per_token(config.model, config.data.max_seq_length)
    numbers.add_row("FLOPs per token", f"{flops:,}", f"{amount(flops)}, forward and backward")
    try:
        for name, group in decay_groups(config).items():
            numbers.add_row(name, f"{sum(group.values()):,}", ", ".join(map(escape, group)))
    except ValueError as error:  # a class that only a person's own program registers
        numbers.add_row("weight decay", "?", escape(str(error)))
    batch = config.global_batch_size(world_size)
    train = config.train
    numbers.add_row(
        "global batch",
        f"{batch:,} sequences",
        f"{train.per_device_train_batch_size} x {train.gradient_accumulation_steps} accumulated x "
        f"{layout.dp_size} data parallel = {batch * config.data.max_seq_length:,} tokens",
    )
    console.print(numbers)


def facts(config: Config, world_size: int) -> dict[str, Any]:
    """The numbers of the report, for programs. Raises ConfigError when the layout is impossible.

    Parameters are numbers, bytes are bytes; `stages` has what a rank of each pipeline stage holds, `layer_activations`
    what a micro-batch keeps in one layer, what it needs more for a moment, and what is cached until forward ends.
    """
    layout = Layout.of(config, world_size)
    counts = parameter_counts(config.model)
    layers_of = layers_by_pp_rank(config)
    held = zip(per_rank(config.model, layout, layers_of), layers_of, state_bytes(config, layout), strict=True)
    batch = config.global_batch_size(world_size)
    return {
        "world_size": world_size,
        "groups": {axis: layout.groups(axis) for axis in _MEANING},
        "parameters": counts.total,
        "active_parameters": counts.active,
        "flops_per_token": flops_per_token(config.model, config.data.max_seq_length),
        "global_batch": {"sequences": batch, "tokens": batch * config.data.max_seq_length},
        "layer_activations": {
            name.replace(" ", "_"): {part: round(size) for part, size in asdict(needed).items()}
            for name, needed in layer_activations(config, device_kind(config)).items()
        },
        "stages": [
            {
                "stage": stage.stage,
                "layers": [layer for layers in ranges for layer in layers],
                "parameters": {"total": stage.total, "dense": stage.dense, "experts": stage.experts},
                "bytes": {**asdict(state), "total": state.total},
            }
            for stage, ranges, state in held
        ],
    }


def decay_groups(config: Config) -> dict[str, dict[str, int]]:
    """What weight decay shrinks and what it leaves: numbers of trained parameters by name, all layers and kin together.

    A class of one's own is built for this, without memory; raises ValueError where it is not known.
    """
    model, trained = config.model, TrainedWeights.of(config)
    if model.router == "topk" and model.expert in STACKED:
        shapes = trainable_shapes(config)
        decayed = {name for name, shape in shapes.items() if decays(name, len(shape) - (".moe.experts." in name))}
    else:
        import torch

        from moe_dist.models.transformer import Transformer

        with torch.device("meta"):
            built = Transformer(model, config.balance)
            built.add_adapters(config.lora)
        shapes = {name: tuple(p.shape) for name, p in built.named_parameters() if p.requires_grad}
        decayed = built.decayed_names()
    parts = {name: trained.part(name) for name in shapes}
    shapes = {
        name: shape if parts[name] is True else (len(parts[name]), *shape[1:])  # type: ignore[arg-type]
        for name, shape in shapes.items()
        if parts[name]
    }
    groups: dict[str, dict[str, int]] = {f"weight decay {config.optimizer.weight_decay:g}": {}, "no weight decay": {}}
    for name, shape in shapes.items():
        kin = re.sub(
            r"\b[a-z_]+_(proj|norm)\b", r"*_\1", re.sub(r"\.\d+\.", ".*.", re.sub(r"^layers\.\d+\.", "", name))
        )
        group = list(groups.values())[name not in decayed]
        group[kin] = group.get(kin, 0) + math.prod(shape)
    return {name: group for name, group in groups.items() if group}


def _layers(layers: range) -> str:
    return f"{layers.start}-{layers.stop - 1}" if len(layers) > 1 else f"{layers.start}"


def _group(ranks: list[int]) -> str:
    """[0,2], [0-7], or [0,8,..,56]: short, and without a space at which a narrow terminal would break it."""
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"[{ranks[0]}-{ranks[-1]}]"
    shown = list(map(str, ranks))
    return "[" + ",".join(shown if len(shown) <= 8 else [*shown[:2], "..", shown[-1]]) + "]"
