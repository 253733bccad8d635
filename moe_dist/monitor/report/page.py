"""`report.html`: one page about one or several runs, with everything in it; opens anywhere, without a network.

Figures by Plotly (whose code is inside the page), findings in words, tables for those who do not see the figures.
Plotly and numpy are imported here: import this module only when a report is wanted.
"""

from __future__ import annotations

import html
import json
import string
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from moe_dist.config import ConfigError
from moe_dist.monitor.expert_stats import overall, used_share
from moe_dist.monitor.health.doctor import findings
from moe_dist.monitor.report import figures, specialisation
from moe_dist.monitor.report.starts import TITLES, starts_table
from moe_dist.monitor.run_log import SERIES, Row, RunLog, read_run

PAGE = Path(__file__).with_name("report_page.html")


Planned = Callable[[RunLog], tuple[Sequence[str], Sequence[Sequence[str]]]]
"""What a plan says of a run beside what it has measured: titles, and rows whose first cell names them."""


def write_report(
    folders: Sequence[Path | str], output: Path | str | None = None, planned: Planned | None = None
) -> Path:
    """Read the run folders and write the page; returns where: `report.html` in the folder of a single run.

    Several runs are compared on one page, `report.html` in the current folder. Raises ConfigError for a folder
    without a log.
    """
    runs = [read_run(folder) for folder in folders]
    default = runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html")
    path = Path(output) if output is not None else default
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(runs, planned), encoding="utf-8")
    return path


def page(runs: Sequence[RunLog], planned: Planned | None = None) -> str:
    """The whole page as HTML."""
    made = Page()
    names = ", ".join(run.name for run in runs)
    made.section("summary", "Summary", _summary_table(runs))
    made.section("findings", "Findings", "".join(_finding_list(run, len(runs) > 1) for run in runs))
    made.section("learning", "Loss and learning rate")
    made.chart("loss", figures.loss(runs), "Training and validation loss in nats per token, and the learning rate.")
    made.section("speed", "Throughput, and where the time goes")
    made.chart("throughput", figures.throughput(runs), "Tokens per second, all ranks together.")
    for index, run in enumerate(runs):
        of = f" of {run.name}" if len(runs) > 1 else ""
        made.chart(f"time-{index}", figures.time_shares(run), f"Share of step time{of}, stacked.")
        if any(row.get("phase_seconds") for row in run.train):
            caption = f"Seconds of each logging interval in each phase{of}, mean over ranks, stacked."
            made.chart(f"phases-{index}", figures.phases(run), caption)
        if any(row.get("ranks") for row in run.train):
            caption = f"Own seconds of each rank{of}, in which it waits for no other, and the imbalance tax, per step."
            made.chart(f"ranks-{index}", figures.own_seconds(run), caption)
        if any((row.get("ranks") or {}).get("rows_to") for row in run.train):
            caption = f"Token flow{of}: rows, (token, expert) pairs, from rank to rank in the last interval."
            made.chart(f"flow-{index}", figures.flow(run), caption)
    if planned is not None:
        made.section("planned", "Planned and measured", "".join(_planned(run, planned, len(runs) > 1) for run in runs))
    made.section("experts", "Experts")
    for index, run in enumerate(runs):
        if not any(row["layers"] for row in run.train):
            made.add(f"<p>{_text(run.name)}: no expert layers.</p>")
            continue
        made.add(f"<h3>{_text(run.name)}</h3>" if len(runs) > 1 else "")
        made.heatmap(index, run, len(runs))
        for key, metric in SERIES.items():
            marked = key == "load_imbalance" and bool(run.actions)
            caption = f"Of each layer. {metric.help}"
            caption += " Triangles: balancing was changed by itself (balance.act)." if marked else ""
            made.chart(f"{key}-{index}", figures.per_layer(run, key, metric.chart, marked), caption)
        made.add(_layer_table(run))
        made.domains(index, run)
    made.section("checkpoints", "Checkpoints and restarts")
    for index, run in enumerate(runs):
        if run.checkpoints:
            caption = f"Checkpoints of {run.name}: how long each took, and how long training waited."
            made.chart(f"checkpoints-{index}", figures.checkpoints(run), caption)
        else:
            made.add(f"<p>{_text(run.name)}: no checkpoint was written.</p>")
        if run.starts:
            made.add(f"<h3>Starts of {_text(run.name)}</h3>" + table(TITLES, starts_table(run)))
    made.section("configuration", "Configuration", "".join(map(_configuration, runs)))
    return made.html(f"Training report: {names}", [run.starts[-1]["sentence"] for run in runs if run.starts])


class Page:
    """Parts of a page in their order, and its table of contents."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.contents: list[tuple[str, str]] = []

    def html(self, title: str, lead: Sequence[str]) -> str:
        """The whole page; `lead`: sentences under the title."""
        return string.Template(PAGE.read_text(encoding="utf-8")).substitute(
            title=_text(title),
            lead="".join(f"<p>{_text(sentence)}</p>" for sentence in lead),
            contents="".join(f'<li><a href="#{anchor}">{_text(name)}</a></li>' for anchor, name in self.contents),
            body="\n".join(self.parts),
            plotly=get_plotlyjs(),
        )

    def add(self, part: str) -> None:
        self.parts.append(part)

    def section(self, anchor: str, title: str, content: str = "") -> None:
        self.contents.append((anchor, title))
        self.add(f'<h2 id="{anchor}">{_text(title)}</h2>{content}')

    def chart(self, name: str, made: go.Figure, caption: str) -> None:
        self.add(
            f'<figure><figcaption>{_text(caption)}</figcaption><div class="chart" id="{name}" role="img" '
            f'aria-label="{_text(caption)}" data-figure="figure-{name}"></div></figure>'
            + _data(f"figure-{name}", json.loads(made.to_json()))
        )

    def heatmap(self, index: int, run: RunLog, num_runs: int) -> None:
        shown = figures.frames(run, num_runs)
        self._slider(f"{index}", f"load-{index}", "Step of the picture below", shown)
        caption = "Load of every expert, all layers: near white is the fair share, blue less, red more."
        self.chart(f"load-{index}", figures.utilisation(shown), caption)

    def domains(self, index: int, run: RunLog) -> None:
        """Which experts each named source of data goes to, layer by layer."""
        shown = specialisation.frames(run)
        if shown is None:
            return
        self._slider(f"domains-{index}", f"domains-{index}", "Layer of the picture below", shown)
        caption = (
            f"Routing by domain of data, steps {shown['first']:,} to {shown['last']:,}: share of the domain's tokens "
            "an expert gets / share of all tokens it gets; near white is no specialisation, red more, blue less."
        )
        self.chart(f"domains-{index}", specialisation.heatmap(shown), caption)
        titles = ["domain", "experts that have most more of it than of all data (share / average)"]
        self.add(table(titles, specialisation.strongest(shown)))

    def _slider(self, name: str, chart: str, words: str, shown: dict[str, Any]) -> None:
        label, frames = f"step-{name}", f"frames-{name}"
        self.add(
            f'<p><label for="slider-{name}">{words}</label> '
            f'<input type="range" id="slider-{name}" min="0" max="0" step="1" data-frames="{frames}" '
            f'data-chart="{chart}" data-label="{label}"> <output id="{label}" for="slider-{name}"></output></p>'
            + _data(frames, shown)
        )


def _data(name: str, value: Any) -> str:
    # `<` could end the script element from inside a string.
    text = json.dumps(value, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _text(words: object) -> str:
    return html.escape(str(words))


def _finding_list(run: RunLog, named: bool) -> str:
    said = findings(run)
    heading = f"<h3>{_text(run.name)}</h3>" if named else ""
    if not said:
        return f"{heading}<p>Nothing that needs attention.</p>"
    return f"{heading}<ul>{''.join(f'<li>{_text(sentence)}</li>' for sentence in said)}</ul>"


def _summary_table(runs: Sequence[RunLog]) -> str:
    columns = [_summary(run) for run in runs]
    return table(["", *(run.name for run in runs)], [[key, *(c[key] for c in columns)] for key in columns[0]])


def _summary(run: RunLog) -> dict[str, str]:
    last, start = run.train[-1], run.starts[-1] if run.starts else {}
    best: Row | None = min(run.evals, key=lambda row: row["loss"], default=None)
    totals = overall(run.layers(next((row for row in reversed(run.train) if row["layers"]), last)))
    return {
        "ended": run.summary["reason"] if run.summary else "-",
        "last logged": datetime.fromtimestamp(last["time"], UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "steps": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}",
        "tokens per second, mean": f"{last['tokens'] / run.training_seconds:,.0f}" if run.training_seconds else "-",
        "training loss, first and last": f"{run.train[0]['loss']:.4f}, {last['loss']:.4f}",
        "best validation loss": f"{best['loss']:.4f} at step {best['step']:,}" if best else "-",
        "unigram baseline": f"{best['unigram_loss']:.4f}" if best and best.get("unigram_loss") is not None else "-",
        "load imbalance, mean of layers": f"{totals['load_imbalance']:.2f}" if totals else "-",
        "dead experts": f"{totals['dead_experts']:.0f}" if totals else "-",
        "checkpoints": str(run.num_checkpoints),
        "ranks": f"{start['world_size']} on {start['device']}" if start else "-",
        "parameters, active per token": f"{start['total_params']:,}, {start['active_params']:,}" if start else "-",
    }


def _layer_table(run: RunLog) -> str:
    """The last interval as numbers: what the pictures show, for those who do not see them."""
    rows = []
    for layer in run.layers(next(row for row in reversed(run.train) if row["layers"])):
        load = layer.tokens_per_expert
        rows.append(
            [
                str(layer.layer),
                f"{layer.load_imbalance:.2f}",
                f"{used_share(layer):.0%}",
                str(layer.dead_experts),
                f"{layer.dropped_fraction:.1%}",
                f"{layer.aux_loss:.3f}",
                f"{layer.z_loss:.3f}",
                f"{layer.router_entropy:.3f}",
                f"{load.index(max(load))}",
                f"{load.index(min(load))}",
            ]
        )
    titles = ["layer", "imbalance", "experts in use", "dead", "dropped", "balancing loss", "z-loss", "router entropy"]
    made = table([*titles, "busiest expert", "least busy"], rows)
    return f"<details><summary>The last interval in numbers</summary>{made}</details>"


def _planned(run: RunLog, planned: Planned, named: bool) -> str:
    heading = f"<h3>{_text(run.name)}</h3>" if named else ""
    try:
        return heading + table(*planned(run))
    except ConfigError as error:  # of an older version, or on a device that no plan knows
        return f"{heading}<p>No plan: {_text(error)}.</p>"


def _configuration(run: RunLog) -> str:
    start = run.starts[-1] if run.starts else {}
    made = f"<details><summary>{_text(run.name)}</summary><pre>{_text(start.get('config_text', ''))}</pre></details>"
    if origin := start.get("pretrained"):
        revision = f", revision {origin['revision']}" if origin["revision"] else ""
        files = table(["file", "SHA-256"], list(origin["files"].items()))
        made += f"<details><summary>Weights of step 0: {_text(origin['folder'] + revision)}</summary>{files}</details>"
    return made


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As HTML; the first cell of a row names it."""
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in titles)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
