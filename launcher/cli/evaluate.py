"""`moe-dist evaluate` and `moe-dist experts`: a model in numbers. Torch is imported when there is one to measure."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from launcher.cli.checkpoint import Key
from launcher.cli.inference import AdapterPath, Dtype, Model, Nproc, Step, run_inference
from launcher.cli.paths import expanded
from launcher.connect.environment import started_by_torchrun
from moe_dist.config import ConfigError

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
    typer.Option(min=1, help="Samples of data.max_seq_length tokens at most, spread over all text; default: all."),
]


def evaluate(
    context: typer.Context,
    model: Model,
    data: Data = None,
    max_samples: MaxSamples = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", callback=expanded, help="All numbers; - for standard output."),
    ] = None,
    adapter_path: AdapterPath = None,
    nproc: Nproc = 1,
    step: Step = None,
    dtype: Dtype = "fp32",
    encryption_key: Key = None,
) -> None:
    """Measure models on held-out text: loss, perplexity, bits per byte, accuracy, load of the experts.

    More models may follow the first, and then key=value; they stand side by side. Perplexity is told for each source,
    the loss by position too. Everything is computed on [bold]--nproc[/bold] ranks in whatever layout.

    [dim]Example:[/dim]  moe-dist evaluate outputs/demo --data wiki=wiki.txt --data code=code.jsonl --json scores.json
    """
    models = [model, *(word for word in context.args if "=" not in word)]
    overrides = [word for word in context.args if "=" in word]
    if started_by_torchrun() and len(models) > 1:
        raise ConfigError(f"{' '.join(models)}: under torchrun one model at a time")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, one in enumerate(models):
            result = json_file if started_by_torchrun() and json_file else f"{folder}/{number}.json"
            options: dict[str, Any] = {"data": data or [], "max_samples": max_samples, "name": one, "result": result}
            how = (nproc, step, dtype, encryption_key, adapter_path)
            code = run_inference("evaluate", one, overrides, options, *how)
            if code:
                raise typer.Exit(code)
            rows.append(json.loads(Path(result).read_text("utf-8")))
    text = json.dumps(rows[0] if len(rows) == 1 else rows, indent=1)
    if json_file == "-":
        print(text)
        return
    if json_file is not None:
        Path(json_file).write_text(text + "\n", "utf-8")
    print_scores(rows)


def print_scores(rows: list[dict[str, Any]]) -> None:
    """A table of sources, one of positions, and what the experts have to do."""
    console = Console(soft_wrap=True)
    table = Table(
        *("model", "source", "loss", "perplexity", "bits per byte", "accuracy", "tokens"),
        box=None,
        pad_edge=False,
    )
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
    console.print(table)
    for row in rows:
        places = "  ".join(f"{one['from']}-{one['to'] - 1}: {one['loss']:.3f}" for one in row["loss_by_position"])
        named = f"{row['model']}: " if len(rows) > 1 else ""
        console.print(f"{named}loss by position  {places}", highlight=False)
        if row["load_imbalance"]:
            load = "  ".join(f"L{layer} {ratio:.2f}x" for layer, ratio in row["load_imbalance"].items())
            console.print(f"{named}busiest expert, of the fair share  {load}", highlight=False)
        console.print(f"{named}{row['tokens_per_second']:,.0f} tokens/s", highlight=False)


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
