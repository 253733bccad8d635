"""What has come of a sweep: a table for the terminal, a page for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich.console import Console
from rich.table import Table

from launcher.sweep.plan import Sweep, is_done, metric_of, state


def print_table(sweep: Sweep) -> None:
    """All trials, the best first."""
    table = Table(box=None, pad_edge=False)
    for key in sweep.keys:
        table.add_column(key)
    columns = [sweep.metric, *(name for name in ("loss", "eval/loss") if name != sweep.metric)]
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("steps", justify="right")
    table.add_column("time", justify="right")
    table.add_column("state")
    for trial, outcome in sweep.ranked():
        numbers = [metric_of(outcome, name) for name in columns]
        steps, seconds = metric_of(outcome, "step"), (outcome or {}).get("seconds")
        error = (outcome or {}).get("error")
        table.add_row(
            *(trial.values[key] for key in sweep.keys),
            *("-" if number is None else f"{number:.4f}" for number in numbers),
            "-" if steps is None else f"{steps:.0f}",
            "-" if seconds is None else f"{seconds:.0f} s",
            state(outcome) + (f": {error}" if error else ""),
        )
    Console(highlight=False, markup=False).print(table)


def write_page(sweep: Sweep) -> Path:
    """sweep.html: every trial a line through its values to its metric; it needs no network."""
    done = [(trial, outcome) for trial, outcome in sweep.ranked() if is_done(outcome)]
    rows = [(trial, value) for trial, outcome in done if (value := metric_of(outcome, sweep.metric)) is not None]
    metrics = [value for _, value in rows]
    axes: list[dict[str, Any]] = []
    for key in sweep.keys:
        choices = list(dict.fromkeys(trial.values[key] for trial in sweep.trials))
        axes.append(
            {
                "label": key,
                "tickvals": list(range(len(choices))),
                "ticktext": choices,
                "range": [-0.1, len(choices) - 0.9],
                "values": [choices.index(trial.values[key]) for trial, _ in rows],
            }
        )
    axes.append({"label": sweep.metric, "values": metrics})
    scale = "Viridis_r" if sweep.mode == "max" else "Viridis"
    lines = go.Parcoords(dimensions=axes, line={"color": metrics, "colorscale": scale, "showscale": True})
    figure = go.Figure(lines)
    figure.update_layout(
        title=f"{len(rows)} of {len(sweep.trials)} trials by {sweep.metric}",
        template="plotly_white",
        margin={"l": 120, "r": 60, "t": 100, "b": 40},
    )
    path = sweep.folder / "sweep.html"
    figure.write_html(path, include_plotlyjs=True, full_html=True)
    return path
