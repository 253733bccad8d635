"""Which experts do the tokens of each named source of data go to, against those of all: values, figure and table.

Shape suffixes: L layers, N domains, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from moe_dist.monitor.report.figures import figure, load_scale
from moe_dist.monitor.run_log import Row, RunLog

INTERVALS = 10
"""Logged lines, from the last one back, that are added up: a rare domain may be absent from a single one."""
STRONGEST = 3
"""Experts that the table names for each domain."""


def specialisation(pairs_NE: Sequence[Sequence[int]]) -> list[list[float | None]]:
    """(N, E): share of the domain's tokens that the expert gets / share of all tokens that it gets.

    1 where the domain is routed as the rest is, 0 where the expert gets none of it; None for an expert without tokens
    and a domain without any.
    """
    load_E = [sum(column) for column in zip(*pairs_NE, strict=True)]
    total = sum(load_E)
    return [
        [
            pairs * total / (sum(pairs_E) * load) if load and sum(pairs_E) else None
            for pairs, load in zip(pairs_E, load_E, strict=True)
        ]
        for pairs_E in pairs_NE
    ]


def frames(run: RunLog) -> dict[str, Any] | None:
    """What the slider over layers shows, of the last intervals: (L, N, E) ratios; None when nothing was counted."""
    names = run.starts[-1].get("domains") if run.starts else None
    rows = [row for row in run.train if row["layers"] and _num_domains(row) == len(names or ())]
    if not rows or not names:
        return None
    rows = rows[-INTERVALS:]
    before = run.train.index(rows[0])
    counts = np.array([[layer["domain_tokens"] for layer in row["layers"]] for row in rows], dtype=np.int64)
    ratios_LNE = [specialisation(pairs_NE) for pairs_NE in counts.sum(axis=0).tolist()]
    return {
        "unit": "layer",
        "steps": [layer["layer"] for layer in rows[-1]["layers"]],
        "first": run.train[before - 1]["step"] + 1 if before else 1,
        "last": rows[-1]["step"],
        "domains": names,
        "z": [[[_rounded(ratio) for ratio in ratios] for ratios in ratios_NE] for ratios_NE in ratios_LNE],
    }


def _num_domains(row: Row) -> int:
    return len(row["layers"][0].get("domain_tokens", ()))


def _rounded(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 3)


def heatmap(shown: dict[str, Any]) -> go.Figure:
    """The last of the layers; blue less than of all data, red more."""
    names, ratios = shown["domains"], shown["z"][-1]
    made = figure(
        xaxis={"title": {"text": "expert"}, "showgrid": False},  # cells without a value stay empty
        hovermode="closest",
        height=max(240, 150 + 26 * len(names)),
        margin={"l": 60, "r": 60, "t": 40, "b": 50},
        yaxis={"type": "category", "autorange": "reversed", "automargin": True, "showgrid": False},
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
        words = ", ".join(f"layer {layer} expert {expert} ({ratio:.2f})" for ratio, layer, expert in best)
        rows.append([name, words or "no tokens"])
    return rows
