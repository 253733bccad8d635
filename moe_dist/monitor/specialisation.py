"""Which experts do the tokens of each named source of data go to, against those of all: values, figure and table.

Shape suffixes: L layers, N domains, E experts.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from moe_dist.monitor.figures import figure, load_scale
from moe_dist.monitor.records import LayerRecord
from moe_dist.monitor.run_log import RunLog

STRONGEST = 3
"""Experts that the table names for each domain."""


def specialisation(record: LayerRecord) -> list[list[float | None]]:
    """(N, E): share of the domain's tokens that the expert gets / share of all tokens that it gets.

    1 where the domain is routed as the rest is, 0 where the expert gets none of it; None for an expert without tokens
    and a domain without any in the interval.
    """
    load_E = [sum(column) for column in zip(*record.domain_tokens, strict=True)]
    total = sum(load_E)
    return [
        [
            pairs * total / (sum(pairs_E) * load) if load and sum(pairs_E) else None
            for pairs, load in zip(pairs_E, load_E, strict=True)
        ]
        for pairs_E in record.domain_tokens
    ]


def frames(run: RunLog) -> dict[str, Any] | None:
    """What the slider over layers shows, of the last interval: (L, N, E) ratios; None when nothing was counted."""
    row = next((row for row in reversed(run.train) if any(layer.get("domain_tokens") for layer in row["layers"])), None)
    names = run.starts[-1].get("domains") if run.starts else None
    if row is None or not names:
        return None
    layers = run.layers(row)
    return {
        "unit": "layer",
        "steps": [layer.layer for layer in layers],
        "step": row["step"],
        "domains": names,
        "z": [[[_rounded(ratio) for ratio in ratios] for ratios in specialisation(layer)] for layer in layers],
    }


def _rounded(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 3)


def heatmap(shown: dict[str, Any]) -> go.Figure:
    """The last of the layers; blue less than of all data, red more."""
    names, ratios = shown["domains"], shown["z"][-1]
    made = figure(
        xaxis_title="expert",
        hovermode="closest",
        height=max(220, 130 + 26 * len(names)),
        yaxis={"type": "category", "autorange": "reversed", "automargin": True},
    )
    made.add_trace(
        go.Heatmap(
            x=list(range(len(ratios[0]))),
            y=names,
            z=ratios,
            zmin=0.0,
            zmax=2.0,
            colorscale=load_scale(),
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "share / average"}, "tickvals": [0, 0.5, 1, 1.5, 2]},
            hovertemplate="%{y} to expert %{x}: %{z:.3f} of the average<extra></extra>",
        )
    )
    return made


def strongest(shown: dict[str, Any]) -> list[list[str]]:
    """For each domain its name and the experts of all layers that have most more of it than of all data."""
    rows = []
    for number, name in enumerate(shown["domains"]):
        found = [
            (ratio, layer, expert)
            for layer, ratios in zip(shown["steps"], shown["z"], strict=True)
            for expert, ratio in enumerate(ratios[number])
            if ratio is not None
        ]
        best = sorted(found, key=lambda one: (-one[0], one[1:]))[:STRONGEST]
        rows.append([name, ", ".join(f"layer {layer} expert {expert} ({ratio:.2f})" for ratio, layer, expert in best)])
    return rows
