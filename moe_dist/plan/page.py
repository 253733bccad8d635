"""A plan as a page: memory and time of the fastest layouts, and what time costs in memory. Plotly is imported here."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import plotly.graph_objects as go

from moe_dist.monitor.report.figures import COLOURS, figure
from moe_dist.monitor.report.page import Page, table
from moe_dist.plan.cluster import Cluster
from moe_dist.plan.search import Estimate, Plan
from moe_dist.plan.words import MEMORY_WORDS, TIME_WORDS, terminal_lines, utilisation
from moe_dist.train.run_summary import amount, byte_size

_SHOWN = 12
_PATTERNS = ("", "/", "x", ".", "-", "|", "+", "\\")


def write_page(path: Path, run_file: str, found: Plan, cluster: Cluster, tokens: int) -> Path:
    """Write the page of a plan that has a layout; returns its path."""
    made = Page()
    best = found.ranked[:_SHOWN]
    made.section("layouts", "The fastest layouts", _layouts(best, cluster))
    made.section("memory", "Memory")
    has = byte_size(int(cluster.memory))
    caption = f"Memory of the most loaded rank in GB, by purpose; the line is what a device has, {has}."
    made.chart("memory-bars", _memory(best, cluster), caption)
    made.section("time", "Time")
    made.chart("time-bars", _time(best), "Seconds of one optimizer step, by purpose.")
    made.section("trade", "Time against memory")
    caption = "Every layout that fits. The line joins those that no other beats in both speed and memory."
    made.chart("pareto", _trade(found.ranked), caption)
    left = [[reason, f"{number:,}"] for reason, number in found.rejected.most_common(20)]
    made.section("left-out", "Left out", table(["why", "layouts"], left) if left else "<p>Nothing.</p>")
    made.section("words", "In words", f"<pre>{_escaped(terminal_lines(run_file, found, cluster, tokens))}</pre>")
    world = found.ranked[0].layout.world_size
    lead = (
        f"{run_file} on {world:,} x {cluster.name}, for {amount(tokens)} tokens: {len(found.ranked)} of {found.tried} "
        "layouts fit. Predicted, not measured."
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made.html(f"Plan: {run_file} on {world:,} x {cluster.name}", [lead]), encoding="utf-8")
    return path


def pareto(ranked: Sequence[Estimate]) -> list[Estimate]:
    """Those that no other beats in both speed and memory, the fastest first."""
    kept: list[Estimate] = []
    for one in sorted(ranked, key=lambda one: (-one.tokens_per_second, one.memory.total)):
        if not kept or one.memory.total < kept[-1].memory.total:
            kept.append(one)
    return kept


def _layouts(shown: Sequence[Estimate], cluster: Cluster) -> str:
    titles = ["layout", "tokens/s per device", "MFU", "step, s", "memory", "micro-batches"]
    rows = [
        [
            one.name,
            f"{one.tokens_per_second:,.0f}",
            f"{utilisation(one, cluster):.0%}",
            f"{one.time.total:.3g}",
            byte_size(int(one.memory.total)),
            f"{one.config.train.gradient_accumulation_steps:,}",
        ]
        for one in shown
    ]
    return table(titles, rows)


def _bars(shown: Sequence[Estimate], parts: dict[str, str], of: str, scale: float, title: str) -> go.Figure:
    made = figure(
        barmode="stack",
        hovermode="closest",
        height=170 + 34 * len(shown),
        margin={"l": 60, "r": 60, "t": 90, "b": 50},
        xaxis_title=title,
        yaxis={"automargin": True, "autorange": "reversed"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
    )
    names = [one.name for one in shown]
    for number, (key, words) in enumerate(parts.items()):
        values = [asdict(getattr(one, of))[key] / scale for one in shown]
        if any(values):
            marker = {"color": COLOURS[number % len(COLOURS)], "pattern": {"shape": _PATTERNS[number], "size": 6}}
            made.add_trace(go.Bar(y=names, x=values, name=words, orientation="h", marker=marker))
    return made


def _memory(shown: Sequence[Estimate], cluster: Cluster) -> go.Figure:
    made = _bars(shown, MEMORY_WORDS, "memory", 1e9, "GB")
    made.add_vline(x=cluster.memory / 1e9, line={"dash": "dash", "width": 2})
    return made


def _time(shown: Sequence[Estimate]) -> go.Figure:
    return _bars(shown, TIME_WORDS, "time", 1.0, "seconds")


def _trade(ranked: Sequence[Estimate]) -> go.Figure:
    made = figure(
        hovermode="closest",
        xaxis_title="GB on the most loaded rank",
        yaxis_title="tokens/s per device",
        yaxis_rangemode="tozero",
    )
    shown = ranked[:2000]
    made.add_trace(
        go.Scatter(
            x=[one.memory.total / 1e9 for one in shown],
            y=[one.tokens_per_second for one in shown],
            text=[one.name for one in shown],
            mode="markers",
            name="fits",
            marker={"color": COLOURS[5], "size": 7, "opacity": 0.6},
        )
    )
    front = pareto(ranked)
    made.add_trace(
        go.Scatter(
            x=[one.memory.total / 1e9 for one in front],
            y=[one.tokens_per_second for one in front],
            text=[one.name for one in front],
            mode="lines+markers",
            name="beaten by none",
            line={"color": COLOURS[1], "width": 2},
            marker={"size": 10, "symbol": "diamond"},
        )
    )
    return made


def _escaped(lines: Sequence[str]) -> str:
    return html.escape("\n".join(lines))
