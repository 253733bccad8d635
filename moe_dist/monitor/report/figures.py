"""The figures of the report, by Plotly. Every number is a number of `metrics.jsonl`; nothing is smoothed.

Colours tell apart also with colour-blind eyes and have a contrast of at least 4.5 on white; runs also differ by dash.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from moe_dist.monitor.expert_stats import load_ratios
from moe_dist.monitor.rank_facts import PHASE_KEYS
from moe_dist.monitor.records import ActionRecord
from moe_dist.monitor.run_log import Row, RunLog
from moe_dist.monitor.sinks.heatmap import COLD, FAIR, HOT

COLOURS = ("#0b57a4", "#b3400b", "#00695c", "#7b3294", "#5d4a00", "#37474f")
DASHES = ("solid", "dash", "dot", "dashdot")
MAX_FRAMES, MAX_CELLS = 100, 1_250_000
"""Steps the slider of the heatmap can show: all, or this many, evenly spread, with the last; fewer where the loads of
all runs on a page would be more than MAX_CELLS, so that it stays below 20 MB."""
MAX_COLUMNS = 500
"""Steps of a picture of layers or ranks."""
MANY_LAYERS = 12
_INK, _GRID = "#1b1b1b", "#c9c9c9"


def figure(**layout: Any) -> go.Figure:
    axis = {"gridcolor": _GRID, "linecolor": _INK, "zeroline": False, "automargin": True}
    made = go.Figure()
    made.update_layout(
        template="none",
        font={"family": "system-ui, sans-serif", "size": 14, "color": _INK},
        margin={"l": 60, "r": 60, "t": 20, "b": 50},
        height=360,
        hovermode="x unified",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},  # grows upwards, never into the curves
        xaxis={"title": {"text": "step"}, **axis},
        yaxis=axis,
    )
    made.update_layout(**layout)
    return made


def line(rows: Sequence[Row], key: str, name: str, run: int = 0, colour: str | None = None, **more: Any) -> go.Scatter:
    """A field over steps; runs have their own colour, fields of one run their own dash."""
    style = {"color": colour or COLOURS[run % len(COLOURS)], "width": 2} | more.pop("line", {})
    x, y = [row["step"] for row in rows], [row[key] for row in rows]
    return go.Scatter(x=x, y=y, name=name, mode="lines+markers" if len(rows) < 40 else "lines", line=style, **more)


def loss(runs: Sequence[RunLog]) -> go.Figure:
    rate_axis = {"title": {"text": "learning rate"}, "overlaying": "y", "side": "right", "showgrid": False}
    made = figure(
        yaxis_title="nats per token",
        yaxis2=rate_axis | {"automargin": True, "zeroline": False, **round_ticks(_rates(runs))},
    )
    for index, run in enumerate(runs):
        # Alone, a run has a colour for each curve; beside others, each run has one colour and each curve its dash.
        of, colour = (f" {run.name}", [index] * 4) if len(runs) > 1 else ("", [0, 1, 5, 2])
        made.add_trace(line(run.train, "loss", f"training{of}", colour[0]))
        if run.evals:
            made.add_trace(line(run.evals, "loss", f"validation{of}", colour[1], line={"dash": "dash"}))
            if run.evals[-1].get("unigram_loss") is not None:
                baseline = {"dash": "dot", "width": 1}
                made.add_trace(line(run.evals, "unigram_loss", f"unigram baseline{of}", colour[2], line=baseline))
        rate = {"dash": "dashdot", "width": 1}
        made.add_trace(line(run.train, "learning_rate", f"learning rate{of}", colour[3], yaxis="y2", line=rate))
    return made


def _rates(runs: Sequence[RunLog]) -> float:
    return max((row["learning_rate"] for run in runs for row in run.train), default=0.0)


def round_ticks(highest: float) -> dict[str, Any]:
    """Ticks of an axis from 0 to beyond `highest` at multiples of 1, 2 or 5 times a power of ten, in plain words."""
    if not 0 < highest < math.inf:
        return {"rangemode": "tozero"}
    power = 10.0 ** math.floor(math.log10(highest / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 5 >= highest)
    values = [float(f"{step * number:.6g}") for number in range(math.ceil(highest / step) + 1)]
    return {"tickvals": values, "ticktext": [f"{value:g}" for value in values], "range": [0, 1.02 * values[-1]]}


def throughput(runs: Sequence[RunLog]) -> go.Figure:
    made = figure(yaxis_title="tokens per second", yaxis_rangemode="tozero")
    for index, run in enumerate(runs):
        made.add_trace(line(run.train, "tokens_per_second", run.name, index))
    made.update_layout(showlegend=len(runs) > 1)
    return made


def time_shares(run: RunLog) -> go.Figure:
    """Dispatch and combine, waiting for data, and the rest, stacked to 1."""
    made = figure(yaxis_title="share of step time", yaxis_range=[0, 1], yaxis_tickformat=".0%")
    rows = [row | {"rest": max(0.0, 1.0 - row["all_to_all_share"] - row["data_wait_share"])} for row in run.train]
    for index, (key, name) in enumerate(
        (("all_to_all_share", "dispatch and combine"), ("data_wait_share", "waiting for data"), ("rest", "the rest"))
    ):
        made.add_trace(line(rows, key, name, index, stackgroup="time"))
    return made


def phases(run: RunLog) -> go.Figure:
    """Seconds of each logging interval in each phase, mean over ranks, stacked."""
    beside = {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"}
    made = figure(yaxis_title="seconds of the interval", legend=beside)
    rows = [row for row in run.train if row.get("phase_seconds")]
    for index, key in enumerate(rows[-1]["phase_seconds"]):
        values = [row["phase_seconds"].get(key, 0.0) for row in rows]
        style = {"color": COLOURS[index % len(COLOURS)], "width": 1, "dash": DASHES[index // len(COLOURS)]}
        steps, name = [row["step"] for row in rows], PHASE_KEYS.get(key, key)
        made.add_trace(go.Scatter(x=steps, y=values, name=name, mode="lines", line=style, stackgroup="time"))
    return made


def own_seconds(run: RunLog) -> go.Figure:
    """Seconds of a step in which each rank waits for no other, and the imbalance tax."""
    rows = evenly([row for row in run.train if row.get("ranks")], MAX_COLUMNS)
    steps = [row["step"] for row in rows]
    values = [list(of_rank) for of_rank in zip(*(row["ranks"]["own_seconds"] for row in rows), strict=False)]
    if len(values) > MANY_LAYERS:
        made = figure(yaxis_title="rank", hovermode="closest", height=max(360, 12 * len(values)))
        made.add_trace(go.Heatmap(x=steps, z=values, colorscale="Cividis", colorbar={"title": "seconds"}, zmin=0.0))
        return made
    made = figure(yaxis_title="seconds per step", yaxis_rangemode="tozero")
    for rank, seconds in enumerate(values):
        style = {"color": COLOURS[rank % len(COLOURS)], "width": 2, "dash": DASHES[rank // len(COLOURS)]}
        made.add_trace(go.Scatter(x=steps, y=seconds, name=f"rank {rank}", mode="lines", line=style))
    tax = {"color": _INK, "width": 1, "dash": "dot"}
    made.add_trace(line(rows, "imbalance_seconds", "imbalance tax", line=tax))
    return made


def flow(run: RunLog) -> go.Figure:
    """Rows of the last interval from each rank (down) to each rank (across); empty where they share no experts."""
    rows_to = next(row["ranks"]["rows_to"] for row in reversed(run.train) if (row.get("ranks") or {}).get("rows_to"))
    ep_size, names = len(rows_to[0]), [f"rank {rank}" for rank in range(len(rows_to))]
    counts: list[list[int | None]] = [[None] * len(rows_to) for _ in rows_to]
    for rank, sent in enumerate(rows_to):
        first = rank - rank % ep_size  # ranks of a group are neighbours
        counts[rank][first : first + ep_size] = sent
    made = figure(
        xaxis={"title": {"text": "to"}, "type": "category"},
        yaxis={"title": {"text": "from"}, "type": "category", "autorange": "reversed"},
        hovermode="closest",
        height=min(900, max(260, 120 + 24 * len(rows_to))),
    )
    made.add_trace(
        go.Heatmap(
            x=names,
            y=names,
            z=counts,
            colorscale="Cividis",
            colorbar={"title": {"text": "rows"}},
            hovertemplate="%{y} to %{x}: %{z} rows<extra></extra>",
        )
    )
    return made


def per_layer(run: RunLog, key: str, title: str, marked: bool = False) -> go.Figure:
    """A field of every expert layer over steps: lines, or a picture when there are many layers.

    `marked`: with a triangle where balancing was changed.
    """
    rows = run.layer_rows
    numbers = rows[0]["layers"]
    if len(numbers) > MANY_LAYERS:
        rows = evenly(rows, MAX_COLUMNS)
    values = [[row[key][index] for row in rows] for index in range(len(numbers))]
    steps = [row["step"] for row in rows]
    if len(numbers) > MANY_LAYERS:
        made = figure(yaxis_title="layer", hovermode="closest", height=max(360, 12 * len(numbers)))
        # Anchored at the fair share, so that pictures of different runs compare.
        anchor = {"load_imbalance": {"zmin": 1.0}, "load_entropy": {"zmin": 0.0, "zmax": 1.0}}.get(key, {"zmin": 0.0})
        bar = {"title": title}
        made.add_trace(go.Heatmap(x=steps, y=numbers, z=values, colorscale="Cividis", colorbar=bar, **anchor))
        heights = {(step, number): number for step in steps for number in numbers}
        return _mark_actions(made, run, heights) if marked else made
    made = figure(yaxis_title=title)
    for index, number in enumerate(numbers):
        style = {"color": COLOURS[index % len(COLOURS)], "width": 2, "dash": DASHES[index // len(COLOURS)]}
        made.add_trace(go.Scatter(x=steps, y=values[index], name=f"layer {number}", mode="lines", line=style))
    heights = {(step, n): values[i][j] for i, n in enumerate(numbers) for j, step in enumerate(steps)}
    return _mark_actions(made, run, heights) if marked else made


def _mark_actions(made: go.Figure, run: RunLog, heights: dict[tuple[int, int], float]) -> go.Figure:
    """A triangle for each automatic change of balancing; `heights`: of (step, layer)."""
    records = [ActionRecord.of(row) for row in run.actions if (row["step"], row["layer"]) in heights]
    for name, symbol, up in (("balancing raised", "triangle-up", True), ("taken back", "triangle-down", False)):
        shown = [record for record in records if (record.now > record.before) is up]
        if shown:
            made.add_trace(
                go.Scatter(
                    x=[record.step for record in shown],
                    y=[heights[record.step, record.layer] for record in shown],
                    text=[record.words for record in shown],
                    name=name,
                    mode="markers",
                    marker={"symbol": symbol, "size": 13, "color": _INK, "line": {"color": "#ffffff", "width": 1.5}},
                    hovertemplate="%{text}<extra></extra>",
                )
            )
    return made


def frames(run: RunLog, num_runs: int = 1) -> dict[str, Any]:
    """What the heatmap's slider shows: steps, layer numbers, and load ratios (steps, layers, experts)."""
    rows = [row for row in run.train if row["layers"]]
    cells = sum(len(layer["tokens_per_expert"]) for layer in rows[-1]["layers"]) if rows else 1
    rows = evenly(rows, max(2, min(MAX_FRAMES, MAX_CELLS // max(1, cells * num_runs))))
    return {
        "unit": "step",
        "steps": [row["step"] for row in rows],
        "layers": [layer["layer"] for layer in rows[-1]["layers"]] if rows else [],
        "z": [[[round(ratio, 3) for ratio in load_ratios(layer)] for layer in run.layers(row)] for row in rows],
    }


def evenly(rows: Sequence[Row], most: int) -> list[Row]:
    """All rows, or `most` of them, evenly spread, with the first and the last."""
    last = len(rows) - 1
    return list(rows) if last < most else [rows[round(index * last / (most - 1))] for index in range(most)]


def load_scale() -> list[list[Any]]:
    """Colours from nothing over the fair share to double."""
    return [[share, f"rgb{colour}"] for share, colour in ((0.0, COLD), (0.5, FAIR), (1.0, HOT))]


def utilisation(shown: dict[str, Any]) -> go.Figure:
    """Load ratio of every expert of every layer at the last step; blue below the fair share, red above."""
    layers, ratios = shown["layers"], shown["z"][-1]
    made = figure(
        xaxis_title="expert",
        hovermode="closest",
        height=min(900, max(280, 140 + 24 * len(layers))),
        margin={"l": 60, "r": 60, "t": 40, "b": 50},  # room for the buttons above the scale
        yaxis={"title": {"text": "layer"}, "type": "category", "autorange": "reversed"},
    )
    made.add_trace(
        go.Heatmap(
            x=list(range(max(map(len, ratios)))),
            y=[str(layer) for layer in layers],
            z=ratios,
            zmin=0.0,
            zmax=2.0,
            colorscale=load_scale(),
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "load / fair share"}, "tickvals": [0, 0.5, 1, 1.5, 2]},
            hovertemplate="layer %{y}, expert %{x}: %{z:.3f} of the fair share<extra></extra>",
        )
    )
    return made


def checkpoints(run: RunLog) -> go.Figure:
    """How long each checkpoint took and how long training waited; crosses failed, lines are restarts."""
    made = figure(yaxis_title="seconds", barmode="stack", hovermode="closest")
    # After a restart a step may be saved again; bars of the same step would be stacked.
    good = list({row["step"]: row for row in run.checkpoints if row["ok"]}.values())
    bad = [row for row in run.checkpoints if not row["ok"]]
    steps = [row["step"] for row in good]
    waited = [row["blocked_seconds"] for row in good]
    behind = [row["seconds"] - row["blocked_seconds"] for row in good]
    made.add_trace(go.Bar(x=steps, y=waited, name="training waited", marker={"color": COLOURS[1]}))
    made.add_trace(go.Bar(x=steps, y=behind, name="in the background", marker={"color": COLOURS[0]}))
    if bad:
        made.add_trace(
            go.Scatter(
                x=[row["step"] for row in bad],
                y=[row["seconds"] for row in bad],
                text=[row["reason"] for row in bad],
                name="failed",
                mode="markers",
                marker={"symbol": "x", "size": 12, "color": _INK},
            )
        )
    for start in run.starts[1:]:
        if start["step"] is not None:
            made.add_vline(x=start["step"], line={"color": _INK, "dash": "dot"}, annotation_text="restart")
    return made
