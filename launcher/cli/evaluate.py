"""`moe-dist evaluate` and `moe-dist experts`: a model in numbers. Torch is imported when there is one to measure."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from launcher.cli.checkpoint import Key
from launcher.cli.inference import AdapterPath, Dtype, Int8, Model, Nproc, Step, run_inference
from launcher.cli.paths import expanded
from launcher.connect.environment import started_by_torchrun
from moe_dist.config import ConfigError

UNIGRAM = "unigram"
"""A baseline that is no model's folder."""
WIDE = 200
"""Columns of a table that goes into a file."""
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]FILE",
        help="Text (one document), or .jsonl or .parquet with a document a row; may be given again: each is a source. "
        "Default: what the run holds out.",
    ),
]
MaxSamples = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Samples of data.max_seq_length tokens at most, spread over all text, and rows of a task; default: all.",
    ),
]


def evaluate(
    context: typer.Context,
    model: Model,
    data: Data = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T,...",
            help="Tasks with right answers: [NAME=]FILE.jsonl, and YAML files or names of lm-evaluation-harness. With "
            "them text is measured only where --data names some.",
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Tasks ask as a user does, by the tokenizer's chat template."),
    ] = False,
    max_samples: MaxSamples = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            callback=expanded,
            help="What all others are held against, another model or unigram: the best that token frequencies of the "
            "text itself can do. Default: the first model.",
        ),
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", callback=expanded, help="All numbers; - for standard output."),
    ] = None,
    adapter_path: AdapterPath = None,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE", callback=expanded, help="Write a page that compares them.")
    ] = None,
    nproc: Nproc = 1,
    step: Step = None,
    dtype: Dtype = "fp32",
    int8: Int8 = False,
    encryption_key: Key = None,
) -> None:
    """Measure models: losses of held-out text, tasks with right answers, load of the experts.

    More models may follow the first, and then key=value; they stand side by side, with intervals of their differences
    from the first, or from [bold]--baseline[/bold]. Perplexity is given for each source, and the loss by position.
    Everything is computed on [bold]--nproc[/bold] ranks in whatever layout.

    [dim]Example:[/dim]  moe-dist evaluate outputs/demo --data wiki=wiki.txt --data code=code.jsonl --json scores.json
    """
    models = [model, *(word for word in context.args if "=" not in word)]
    models = [baseline, *models] if baseline not in (None, UNIGRAM) else models
    overrides = [word for word in context.args if "=" in word]
    under_torchrun = started_by_torchrun()
    if under_torchrun and (len(models) > 1 or report or baseline):
        raise ConfigError(f"{' '.join(models)}: under torchrun one model at a time, and no --report or --baseline")
    asked = [task for one in tasks or () for task in one.split(",") if task]
    if baseline == UNIGRAM and asked and not data:
        raise ConfigError(f"--baseline {UNIGRAM}: it answers no task; with --tasks name a text by --data, too")
    if apply_chat_template and not asked:
        raise ConfigError("--apply-chat-template: only with --tasks")
    rows, samples = [], []
    with tempfile.TemporaryDirectory() as folder:
        of_text = (f"{folder}/{UNIGRAM}.json", f"{folder}/{UNIGRAM}.sums.json")
        for number, one in enumerate(models):
            result = json_file if under_torchrun and json_file else f"{folder}/{number}.json"
            sums = None if under_torchrun else f"{folder}/{number}.sums.json"
            options: dict[str, Any] = {"data": data or [], "tasks": asked, "max_samples": max_samples}
            options |= {"name": one, "result": result, "sums": sums, "chat_template": apply_chat_template}
            options["unigram"] = of_text if baseline == UNIGRAM and number == 0 else None
            how = (nproc, step, dtype, encryption_key, adapter_path, int8)
            code = run_inference("evaluate", one, overrides, options, *how)
            if code:
                raise typer.Exit(code)
            written: list[tuple[str, str | None]] = [of_text] if options["unigram"] else []
            for row_file, sums_file in [*written, (result, sums)]:
                rows.append(json.loads(Path(row_file).read_text("utf-8")))
                samples.append({} if sums_file is None else json.loads(Path(sums_file).read_text("utf-8")))
    from moe_dist.evaluate.comparison import compare

    compared = compare(samples)
    for row, intervals in zip(rows, compared.to_json(), strict=True):
        row |= intervals
    text = json.dumps(rows[0] if len(rows) == 1 else rows, indent=1)
    if json_file not in (None, "-"):
        Path(json_file).write_text(text + "\n", "utf-8")
    if json_file == "-":
        print(text)
    else:
        print_scores(rows)
    if report is not None:
        from moe_dist.evaluate.comparison_page import write_comparison_page

        write_comparison_page(rows, compared, Path(report))
        print(report, file=sys.stderr)


def print_scores(rows: list[dict[str, Any]]) -> None:
    """A table of sources, one of tasks, one of positions, and what the experts have to do."""
    from moe_dist.evaluate.comparison import short_names

    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
    names = short_names([row["model"] for row in rows])
    rows = [row | {"model": name} for row, name in zip(rows, names, strict=True)]
    if any("loss" in row for row in rows):
        console.print(_losses([row for row in rows if "loss" in row]))
    if any(row.get("tasks") for row in rows):
        console.print(_tasks([row for row in rows if row.get("tasks")]))
    if len(rows) > 1:
        console.print(_differences(rows))
    for row in rows:
        named = f"{row['model']}: " if len(rows) > 1 else ""
        for text in _more(row):
            console.print(f"{named}{text}", highlight=False)


def _losses(rows: list[dict[str, Any]]) -> Table:
    titles = ("model", "source", "loss", "perplexity", "bits per byte", "accuracy", "tokens")
    table = Table(*titles, box=None, pad_edge=False)
    for row in rows:
        sources = row["sources"]
        for name, of in [*(sources.items() if len(sources) > 1 else ()), ("all", row)]:
            bits = "-" if of["bits_per_byte"] is None else f"{of['bits_per_byte']:.4f}"
            cells = (
                f"{of['loss']:.4f}",
                f"{of['perplexity']:,.2f}",
                bits,
                f"{of['accuracy']:.2%}",
                f"{of['tokens']:,}",
            )
            table.add_row(row["model"], name, *cells)
    return table


def _tasks(rows: list[dict[str, Any]]) -> Table:
    """A line for each metric of each task, a column for each model."""
    several = len(rows) > 1
    table = Table("task", "metric", *(row["model"] if several else "value" for row in rows), box=None, pad_edge=False)
    for name, of in rows[0]["tasks"].items():
        for metric in [metric for metric in of if metric != "samples" and "_stderr" not in metric]:
            table.add_row(name, metric, *(f"{row['tasks'][name].get(metric, math.nan):.4f}" for row in rows))
    return table


def _differences(rows: list[dict[str, Any]]) -> Table:
    """What each model has more than the first, with its interval."""
    titles = (f"more than {rows[0]['model']}", "metric", "difference", "95% interval", "is")
    table = Table(*titles, box=None, pad_edge=False)
    for row in rows[1:]:
        for metric, of in row["differences"].items():
            interval = f"{of['low']:+.4f} to {of['high']:+.4f}"
            table.add_row(row["model"], metric, f"{of['difference']:+.4f}", interval, of["verdict"])
    return table


def _more(row: dict[str, Any]) -> list[str]:
    cost = [] if "flops" not in row else _cost(row)
    if "loss" not in row:
        return cost
    losses = "  ".join(f"{one['from']}-{one['to'] - 1}: {one['loss']:.3f}" for one in row["loss_by_position"])
    said = [f"loss by position  {losses}"]
    if row["load_imbalance"]:
        load = "  ".join(f"L{layer} {ratio:.2f}x" for layer, ratio in row["load_imbalance"].items())
        said.append(f"busiest expert, of the fair share  {load}")
    said.append(f"calibration: confidence is {row['calibration_error']:.2%} off accuracy")
    return [*said, *cost, f"{row['tokens_per_second']:,.0f} tokens/s"]


def _cost(row: dict[str, Any]) -> list[str]:
    flops = f"{row['flops'] / 1e6:,.2f} MFLOP a token forward"
    if row["flops_saved"] > 0:
        flops += (
            f", {row['flops_saved']:.0%} less than the dense model of equal width ({row['dense_flops'] / 1e6:,.2f})"
        )
    latency = row["latency"]
    first, each = 1000 * latency["first_token_seconds"], 1000 * latency["seconds_per_token"]
    return [
        flops,
        f"latency: {first:,.1f} ms to the first token behind {latency['prompt_tokens']}, {each:,.2f} ms for each after",
    ]


def experts(
    context: typer.Context,
    model: Model,
    data: Data = None,
    max_samples: MaxSamples = None,
    page: Annotated[
        str | None, typer.Option("--page", metavar="FILE", callback=expanded, help="Write it as a page, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs, on standard output.")] = False,
    nproc: Nproc = 1,
    step: Step = None,
    dtype: Dtype = "fp32",
    encryption_key: Key = None,
) -> None:
    """Show which tokens and sources go to which expert.

    For every expert of every layer: its share of tokens, how many bits its tokens differ from all text, the expert most
    like it, the one it is often chosen with, and the tokens that make it what it is.

    [dim]Example:[/dim]  moe-dist experts outputs/demo --data code.txt --page experts.html
    """
    options: dict[str, Any] = {"data": data or [], "max_samples": max_samples, "name": model, "as_json": as_json}
    options["page"] = page
    raise typer.Exit(run_inference("experts", model, context.args, options, nproc, step, dtype, encryption_key))
