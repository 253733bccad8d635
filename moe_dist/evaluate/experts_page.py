"""`experts.html`: a study of experts as a page, with the components of the training report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from torch import Tensor

from moe_dist.evaluate.expert_study import ExpertStudy, LayerStudy, shown
from moe_dist.monitor.report.figures import COLOURS, figure, load_scale
from moe_dist.monitor.report.page import Page, table

TOKENS = 12
"""Of each expert in its row."""
_HIGH = [[0.0, "#ffffff"], [1.0, COLOURS[0]]]


def write_experts_page(study: ExpertStudy, name: str, path: Path) -> None:
    """Write the page; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(experts_page(study, name), encoding="utf-8")


def experts_page(study: ExpertStudy, name: str) -> str:
    """The whole page as HTML. `name`: of the model."""
    made = Page()
    made.section("overview", "Layers")
    made.chart("bits", _bits(study), "What an expert tells of its token, in bits, by layer: 0 is no specialisation.")
    load = [[float(one) / max(1, study.num_tokens) for one in layer.load_E] for layer in study.layers]
    caption = "Share of all tokens that each expert gets, all layers."
    made.chart("load", _heatmap(load, "expert", "layer", [str(layer.layer) for layer in study.layers]), caption)
    for layer in study.layers:
        _layer(made, study, layer)
    lead = (
        f"{study.num_tokens:,} tokens, {len(study.words):,} different ones. An expert's most telling tokens are "
        "those that make its share of tokens differ most from that of all text."
    )
    return made.html(f"Experts of {name}", [lead])


def _layer(made: Page, study: ExpertStudy, layer: LayerStudy) -> None:
    number = layer.layer
    made.section(f"layer-{number}", f"Layer {number}")
    if len(study.sources) > 1:
        of_all = layer.sources_NE.sum(1, keepdim=True).clamp(min=1)
        average = layer.load_E / layer.load_E.sum().clamp(min=1)
        ratios = (layer.sources_NE / of_all / average.clamp(min=1e-12)).tolist()
        caption = "Share of a source's pairs that an expert gets / of all pairs; near white is the average, red more."
        made.chart(f"sources-{number}", _ratio_map(ratios, list(study.sources)), caption)
    caption = "How alike the tokens of two experts are: the share that they have in common."
    made.chart(f"overlap-{number}", _heatmap(layer.overlap_EE.tolist(), "expert", "expert", most=1.0), caption)
    if int(layer.load_E.sum()) > study.num_tokens:  # of one expert a token there are no pairs
        caption = "How often two experts get a token together / how often independent ones would; red more, blue less."
        made.chart(f"together-{number}", _ratio_map(_plain(layer.co_activation_EE)), caption)
    rows, special = [], layer.specialisation_E
    for expert in range(len(layer.load_E)):
        tokens = "  ".join(shown(study.words[u]) for u, _, _ in layer.top_tokens(expert, TOKENS)) or "-"
        share = float(layer.load_E[expert]) / max(1, study.num_tokens)
        rows.append([f"E{expert:02d}", f"{share:.1%}", f"{special[expert]:.2f}", tokens])
    made.add(table(["expert", "of tokens", "bits", "most telling tokens"], rows))


def _bits(study: ExpertStudy) -> go.Figure:
    made = figure(
        xaxis={"title": {"text": "layer"}, "dtick": 1}, yaxis={"title": {"text": "bits"}, "rangemode": "tozero"}
    )
    made.add_bar(x=[layer.layer for layer in study.layers], y=[layer.bits for layer in study.layers], name="bits")
    made.update_traces(marker_color=COLOURS[0])
    return made


def _heatmap(
    rows: list[list[float]], across: str, down: str, names: list[str] | None = None, most: float | None = None
) -> go.Figure:
    made = figure(hovermode="closest", height=max(240, min(720, 120 + 16 * len(rows))))
    made.update_layout(xaxis={"title": {"text": across}}, yaxis={"title": {"text": down}, "autorange": "reversed"})
    labels = names or [str(number) for number in range(len(rows))]
    made.add_heatmap(
        z=rows, x=_numbers(rows), y=labels, colorscale=_HIGH, zmin=0, zmax=most, colorbar={"tickformat": ".0%"}
    )
    made.update_xaxes(type="category")
    made.update_yaxes(type="category")
    return made


def _ratio_map(rows: list[list[float | None]] | list[list[float]], names: list[str] | None = None) -> go.Figure:
    made = figure(hovermode="closest", height=max(240, min(720, 120 + 16 * len(rows))))
    made.update_layout(xaxis={"title": {"text": "expert"}}, yaxis={"autorange": "reversed"})
    labels = names or [str(number) for number in range(len(rows))]
    made.add_heatmap(
        z=rows,
        x=_numbers(rows),
        y=labels,
        colorscale=load_scale(),
        zmin=0,
        zmax=2,
        colorbar={"title": {"text": "times"}},
    )
    made.update_xaxes(type="category")
    made.update_yaxes(type="category")
    return made


def _numbers(rows: Sequence[Sequence[object]]) -> list[str]:
    return [str(number) for number in range(len(rows[0]))]


def _plain(values_EE: Tensor) -> list[list[float | None]]:
    """Without NaN, which JSON has not."""
    return [[None if one != one else one for one in row] for row in values_EE.tolist()]
