"""Numbers and records as words, for both kinds of console."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from moe_dist.models.adapter_shapes import trainable_line
from moe_dist.monitor.expert_stats import ExpertLoad, load_ratios
from moe_dist.monitor.records import EvalRecord, LayerRecord, RunInfo, RunSummary, TrainRecord

BLOCKS = "▁▂▃▄▅▆▇█"


def compact(value: float) -> str:
    """912, 18.2k, 1.83M."""
    if not math.isfinite(value):
        return str(value)
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999 950 would print as 1000.0k.
        if abs(value) >= size * 0.99995:
            return f"{value / size:.2f}{unit}" if unit != "k" else f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def memory(num_bytes: float) -> str:
    """700B, 96KiB, 812MiB, 1.2GiB: never zero of a unit that is too large."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f}GiB"
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.0f}{unit}"
    return f"{num_bytes:.0f}B"


def duration(seconds: float | None) -> str:
    """0:42, 12:03, 1:02:03, 2d03h; `-` when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    total = max(0, round(seconds))
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}:{minutes % 60:02d}:{total % 60:02d}"
    return f"{minutes}:{total % 60:02d}"


def loss(value: float | None) -> str:
    """Four digits after the point; `-` when unknown."""
    return "-" if value is None else f"{value:.4f}"


def percent(share: float) -> str:
    """12.0% of a share 0..1."""
    return f"{100 * share:.1f}%"


def expert(load: ExpertLoad) -> str:
    """L3/E07 1.9x."""
    return f"L{load.layer}/E{load.expert:02d} {load.load_ratio:.1f}x"


def step_of(record: TrainRecord, separator: str = "") -> str:
    """Step, and the last one where steps decide: 120/5000."""
    step = f"{record.step:{separator}}"
    return step if record.max_steps is None else f"{step}/{record.max_steps:{separator}}"


def progress(record: TrainRecord) -> float | None:
    """Share of the run that is done, by steps, or by time where time decides; None when unknown."""
    if record.max_steps:
        return min(1.0, record.step / record.max_steps)
    if record.remaining_seconds is None:
        return None
    total = record.elapsed_seconds + record.remaining_seconds
    return record.elapsed_seconds / total if total > 0 else 1.0


def parameters(info: RunInfo) -> str:
    """The line of `peft`'s print_trainable_parameters."""
    return trainable_line(info.trainable_params, info.total_params)


def against_unigram(value: float | None, unigram: float | None) -> str:
    """How a validation loss compares with the baseline; empty when either is unknown."""
    if value is None or unigram is None or math.isnan(value):
        return ""
    return f"unigram {unigram:.4f}, {'better' if value < unigram else 'worse'} by {abs(unigram - value):.4f}"


def reward_pairs(record: TrainRecord | EvalRecord) -> list[tuple[str, str]]:
    """Margin and accuracy of a run on preferences; nothing of others."""
    if record.reward_margin is None or record.reward_accuracy is None:
        return []
    return [("margin", f"{record.reward_margin:.4f}"), ("accuracy", percent(record.reward_accuracy))]


def eval_gain(record: EvalRecord) -> str:
    return against_unigram(record.loss, record.unigram_loss)


def clean(text: str) -> str:
    """Text of a model made safe for a terminal: control characters become a dot, tabs four spaces."""
    lines = text.expandtabs(4).splitlines()
    return "\n".join("".join(char if char.isprintable() else "·" for char in line) for line in lines)


def load_strip(layer: LayerRecord, width: int) -> str:
    """Expert loads as blocks, one expert a column: half height is the fair share, full is double, · is none.

    More experts than `width` share columns, each the mean of its experts.
    """
    ratios = load_ratios(layer)
    columns = min(width, len(ratios))
    edges = [len(ratios) * column // columns for column in range(columns + 1)] if columns > 0 else []
    means = [sum(ratios[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    return "".join("·" if not mean else BLOCKS[max(0, min(7, math.ceil(mean * 4) - 1))] for mean in means)


def most_uneven(layers: Sequence[LayerRecord], limit: int) -> list[LayerRecord]:
    """All layers, or the `limit` with the highest imbalance; in the order of the model."""
    if len(layers) <= limit:
        return list(layers)
    worst = sorted(layers, key=lambda layer: -layer.load_imbalance)[:limit]
    return sorted(worst, key=lambda layer: layer.layer)


def summary_rows(summary: RunSummary, arrow: str) -> list[tuple[str, str]]:
    """(label, words) of the closing table, without paths, layers and samples."""
    rows = [
        ("ended", summary.reason),
        ("steps", f"{summary.steps:,} in {duration(summary.seconds)}"),
        ("tokens", f"{summary.tokens:,} ({summary.tokens_per_second:,.0f} tok/s)"),
        ("training loss", f"{loss(summary.initial_loss)} {arrow} {loss(summary.final_loss)}"),
    ]
    if summary.best_eval_loss is not None:
        against = against_unigram(summary.best_eval_loss, summary.unigram_loss)
        rows.append(("validation loss", loss(summary.best_eval_loss) + (f" ({against})" if against else "")))
    if summary.skipped_steps:
        rows.append(("skipped steps", f"{summary.skipped_steps:,}"))
    return rows
