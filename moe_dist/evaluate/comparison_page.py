"""A page that compares models, with the components of the training report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from moe_dist.evaluate.comparison import LEVEL, NUM_DRAWS, Comparison, Interval, short_names
from moe_dist.monitor.report.figures import COLOURS, DASHES, figure
from moe_dist.monitor.report.page import Page, table

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
Row = Mapping[str, Any]
"""What `--json` has of a model."""


def write_comparison_page(rows: Sequence[Row], compared: Comparison, path: Path) -> None:
    """Write the page; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(comparison_page(rows, compared), encoding="utf-8")


def comparison_page(rows: Sequence[Row], compared: Comparison) -> str:
    """The whole page as HTML."""
    made, names = Page(), short_names([row["model"] for row in rows])
    made.section("numbers", "Numbers", _numbers(names, compared))
    if len(rows) > 1:
        made.section("differences", f"Differences from {names[0]}", _differences(names, compared))
        caption = (
            f"What each model has more than {names[0]}, in percent of its number, with {LEVEL:.0%} intervals: one that "
            "does not touch the line is no accident of which samples were taken. Perplexities: see losses."
        )
        made.chart("difference", _forest(names, compared), caption)
    tasks = {metric for own in compared.intervals for metric in own if ": " in metric}
    if tasks:
        made.section("tasks", "Tasks")
        made.chart("tasks-chart", _task_bars(names, compared), f"Metrics of tasks up to 1, with {LEVEL:.0%} intervals.")
    measured = [(name, row) for name, row in zip(names, rows, strict=True) if "loss" in row]
    if measured:
        made.section("text", "Held-out text", _sources(measured))
        made.chart("positions", _positions(measured), "Loss by position in a sample: what context is worth.")
        off = ", ".join(f"{name} {row['calibration_error']:.2%}" for name, row in measured)
        caption = (
            f"Confidence in the likeliest token against how often it is right. Mean distance from the line: {off}."
        )
        made.chart("calibration", _calibration(measured), caption)
    balanced = [(name, row) for name, row in measured if row["load_imbalance"]]
    if balanced:
        made.section("experts", "Experts")
        made.chart(
            "load", _load(balanced), "Load of the busiest expert of each layer over the fair share; 1: balanced."
        )
    made.section("cost", "Arithmetic and time", _cost(names, rows))
    lead = (
        f"Intervals hold {LEVEL:.0%} of {NUM_DRAWS:,} drawings of samples with replacement; ± is half of one. "
        "Differences draw the same samples for both models wherever these are cut alike."
    )
    return made.html("Models compared: " + ", ".join(names), [lead])


def _shown(metric: str) -> str:
    return metric.replace("_", " ")


def _numbers(names: Sequence[str], compared: Comparison) -> str:
    """Each number, and half of its interval."""
    metrics = dict.fromkeys(metric for own in compared.intervals for metric in own)
    rows = [[_shown(metric), *(_with_error(own.get(metric)) for own in compared.intervals)] for metric in metrics]
    return table(["", *names], rows)


def _with_error(one: Interval | None) -> str:
    return "-" if one is None else f"{_number(one.value)} ± {_number((one.high - one.low) / 2)}"


def _number(value: float, sign: str = "") -> str:
    return format(value, f"{sign}.4f" if abs(value) < 1000 else f"{sign}.3g")


def _differences(names: Sequence[str], compared: Comparison) -> str:
    all_paired = all(one.is_paired for others in compared.differences for one in others.values())
    rows = []
    for name, others in zip(names[1:], compared.differences[1:], strict=True):
        for metric, one in others.items():
            interval = f"{_number(one.low, '+')} to {_number(one.high, '+')}"
            how = [] if all_paired else ["the same samples" if one.is_paired else "each its own"]
            verdict = {"=": "no difference shown"}.get(one.verdict, one.verdict)
            rows.append([name, _shown(metric), _number(one.value, "+"), interval, verdict, *how])
    titles = ["model", "metric", "difference", f"{LEVEL:.0%} interval", "is"]
    return table([*titles, *([] if all_paired else ["drawn"])], rows)


def _forest(names: Sequence[str], compared: Comparison) -> go.Figure:
    base = compared.intervals[0]
    shown = (metric for others in compared.differences for metric in others if base[metric].value)
    # A perplexity is the exponential of a loss, which says the same on a scale that leaves room for others.
    metrics = list(dict.fromkeys(metric for metric in shown if not metric.endswith("perplexity")))
    made = figure(hovermode="closest", height=140 + 34 * len(metrics) * max(1, len(names) - 1))
    made.update_layout(
        xaxis={"title": {"text": f"percent more than {names[0]}"}, "ticksuffix": "%"},
        yaxis={"autorange": "reversed", "tickvals": list(range(len(metrics))), "ticktext": list(map(_shown, metrics))},
    )
    for number, others in enumerate(compared.differences[1:]):
        kept = [(metric, one) for metric, one in others.items() if metric in metrics]
        scale = [100 / abs(base[metric].value) for metric, _ in kept]
        offset = 0.5 * (number + 0.5) / (len(names) - 1) - 0.25
        made.add_scatter(
            x=[one.value * by for (_, one), by in zip(kept, scale, strict=True)],
            y=[metrics.index(metric) + offset for metric, _ in kept],
            error_x={
                "array": [(one.high - one.value) * by for (_, one), by in zip(kept, scale, strict=True)],
                "arrayminus": [(one.value - one.low) * by for (_, one), by in zip(kept, scale, strict=True)],
                "symmetric": False,
                "thickness": 2,
            },
            mode="markers",
            name=names[number + 1],
            marker={"size": 10, "color": COLOURS[(number + 1) % 6], "symbol": _SYMBOLS[(number + 1) % 6]},
            text=[f"{_shown(metric)}: {one.value:+.4f} ({one.low:+.4f} to {one.high:+.4f})" for metric, one in kept],
            hovertemplate="%{text}<extra>%{fullData.name}</extra>",
        )
    made.add_vline(x=0, line={"color": "#1b1b1b", "width": 1})
    return made


def _task_bars(names: Sequence[str], compared: Comparison) -> go.Figure:
    made = figure(hovermode="closest", barmode="group", yaxis_rangemode="tozero")
    made.update_layout(xaxis={"title": {"text": ""}, "type": "category"}, yaxis={"range": [0, 1]})
    for number, (name, own) in enumerate(zip(names, compared.intervals, strict=True)):
        kept = {metric: one for metric, one in own.items() if ": " in metric and one.high <= 1}
        made.add_bar(
            x=list(map(_shown, kept)),
            y=[one.value for one in kept.values()],
            error_y=_bars(list(kept.values())),
            name=name,
            marker={"color": COLOURS[number % 6], "opacity": 0.6},
        )
    return made


def _bars(intervals: Sequence[Interval]) -> dict[str, Any]:
    up, down = [one.high - one.value for one in intervals], [one.value - one.low for one in intervals]
    return {"array": up, "arrayminus": down, "symmetric": False, "color": "#1b1b1b", "thickness": 2}


def _sources(measured: Sequence[tuple[str, Row]]) -> str:
    rows = []
    for name, row in measured:
        for source, of in row["sources"].items():
            bits = "-" if of["bits_per_byte"] is None else f"{of['bits_per_byte']:.4f}"
            cells = [
                f"{of['loss']:.4f}",
                f"{of['perplexity']:,.2f}",
                bits,
                f"{of['accuracy']:.2%}",
                f"{of['tokens']:,}",
            ]
            rows.append([name, source, *cells])
    return table(["model", "source", "loss", "perplexity", "bits per byte", "accuracy", "tokens"], rows)


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % 6], "width": 2, "dash": DASHES[number // 6 % 4]}


def _positions(measured: Sequence[tuple[str, Row]]) -> go.Figure:
    made = figure(yaxis_title="nats per token")
    ranges = [(of["from"], of["to"] - 1) for of in measured[0][1]["loss_by_position"]]
    made.update_layout(xaxis={"title": {"text": "position in the sample"}, "type": "category"})
    for number, (name, row) in enumerate(measured):
        found = {(of["from"], of["to"] - 1): of["loss"] for of in row["loss_by_position"]}
        labels = [f"{first}" if first == last else f"{first}-{last}" for first, last in ranges]
        values = [found.get(one) for one in ranges]
        made.add_scatter(x=labels, y=values, name=name, mode="lines+markers", line=_style(number))
    return made


def _calibration(measured: Sequence[tuple[str, Row]]) -> go.Figure:
    made = figure(hovermode="closest", height=440)
    made.update_layout(
        xaxis={"title": {"text": "confidence"}, "range": [0, 1], "tickformat": ".0%"},
        yaxis={"title": {"text": "accuracy"}, "range": [0, 1], "tickformat": ".0%"},
    )
    line = {"color": "#37474f", "width": 1, "dash": "dot"}
    made.add_scatter(x=[0, 1], y=[0, 1], name="calibrated", mode="lines", line=line, hoverinfo="skip")
    for number, (name, row) in enumerate(measured):
        steps = row["calibration"]
        made.add_scatter(
            x=[of["confidence"] for of in steps],
            y=[of["accuracy"] for of in steps],
            text=[f"{of['tokens']:,} tokens" for of in steps],
            name=name,
            mode="lines+markers",
            line=_style(number),
            hovertemplate="%{x:.1%} sure, %{y:.1%} right, %{text}<extra></extra>",
        )
    return made


def _load(balanced: Sequence[tuple[str, Row]]) -> go.Figure:
    made = figure(yaxis_title="busiest / fair share")
    made.update_layout(xaxis={"title": {"text": "layer"}, "type": "category"})
    for number, (name, row) in enumerate(balanced):
        load = row["load_imbalance"]
        made.add_scatter(x=list(load), y=list(load.values()), name=name, mode="lines+markers", line=_style(number))
    return made


def _cost(names: Sequence[str], rows: Sequence[Row]) -> str:
    cells = [
        [
            name,
            f"{row['flops'] / 1e6:,.2f}",
            f"{row['dense_flops'] / 1e6:,.2f}",
            f"{row['flops_saved']:.0%}",
            f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "-",
            f"{1000 * row['latency']['first_token_seconds']:,.1f}",
            f"{1000 * row['latency']['seconds_per_token']:,.2f}",
        ]
        for name, row in zip(names, rows, strict=True)
        if "flops" in row
    ]
    titles = ["model", "MFLOP a token, forward", "dense model of equal width", "saved", "tokens per second, here"]
    titles += ["ms to the first token", "ms a token"]
    return table(titles, cells)
