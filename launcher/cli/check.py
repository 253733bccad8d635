"""`moe-dist check`: what a run file says, and what would run. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from launcher.backends.command import for_world
from launcher.cli.paths import expanded
from launcher.cli.run_file import ConfigPath, notice, refuse_what_is_missing
from moe_dist.config import ConfigError, dump_config, load_config
from moe_dist.config.vocabulary import vocabulary_needed


def check(
    context: typer.Context,
    config: ConfigPath,
    world_size: Annotated[
        int | None, typer.Option("--world-size", "-n", min=1, help="Ranks; default: launch.nproc_per_node.")
    ] = None,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print every key with its value.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same for programs on standard output.")] = False,
    from_pretrained: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", callback=expanded, help="Start from its weights; print which rank reads which bytes."
        ),
    ] = None,
) -> None:
    """Validate CONFIG and print its layout, without starting anything.

    Which ranks form which group, which experts live where, and how many parameters each rank holds. Where training
    starts from a Hugging Face folder, every tensor of it is accounted for, from the headers of its files.

    [dim]Example:[/dim]  moe-dist check configs/demo.yaml --world-size 4
    """
    from launcher.cli.layout_table import facts, print_report
    from launcher.cli.memory_check import refuse_what_cannot_fit

    overrides = [*context.args, *([] if from_pretrained is None else [f"model.from_pretrained={from_pretrained}"])]
    settings = load_config(config, overrides, notice=notice)
    if show_config and as_json:
        print(json.dumps(settings.model_dump(mode="json"), indent=1))
        return
    if show_config:
        print(dump_config(settings), end="")
        return
    needed = vocabulary_needed(settings.data.tokenizer)
    if needed is not None and needed > settings.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={settings.model.vocab_size}: the tokenizer {settings.data.tokenizer} needs {needed}"
        )
    ranks = world_size or settings.launch.nproc_per_node
    if settings.parallel.layout == "auto":
        settings = for_world(settings, ranks, notice, per_host=min(ranks, settings.launch.nproc_per_node))
    refuse_what_cannot_fit(settings, config, ranks, here=ranks <= settings.launch.nproc_per_node, named=True)
    refuse_what_is_missing(settings)
    reading = None
    if settings.model.from_pretrained is not None:
        from launcher.cli.reading_table import plan_of, print_reading

        reading = plan_of(settings, ranks)
    if as_json:
        more = {} if reading is None else {"from_pretrained": [asdict(ranks_alike) for ranks_alike in reading]}
        print(json.dumps(facts(settings, ranks) | more, indent=1))
        return
    print_report(settings, ranks)
    if reading is not None:
        print_reading(settings, reading, in_detail=from_pretrained is not None)
