"""The `moe-dist` command. Torch is imported only where ranks are started."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from launcher.environment import detect, started_by_torchrun
from moe_dist import __version__
from moe_dist.config import Config
from moe_dist.config_loading import ConfigError, dump_config, load_config

app = typer.Typer(
    name="moe-dist",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Train [bold]mixture-of-experts[/bold] language models: the same on a laptop and on a GPU cluster.\n\n"
        "[dim]Start here:[/dim]  moe-dist train configs/demo.yaml\n\n"
        "[dim]Change anything:[/dim]  moe-dist train configs/demo.yaml learning_rate=1e-3 parallel.ep_size=1"
    ),
    epilog="Every key is explained in docs/configuration.md. Exit codes: 0 done, 1 failed, 2 the configuration "
    "or data cannot be used, 3 training stopped itself, 130 Ctrl-C.",
)
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/demo.yaml.")]


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False) -> None:
    if version:
        print(f"moe-dist {__version__}")
        raise typer.Exit


@app.command(context_settings=_OVERRIDES)
def train(context: typer.Context, config: ConfigPath) -> None:
    """Train what CONFIG describes.

    Starts [bold]launch.nproc_per_node[/bold] ranks on this machine; inside torchrun it is the rank it was started
    as. Keys are overridden by [bold]key=value[/bold] after the file: train.max_steps=100, --learning_rate=1e-3.

    The run folder [bold]train.output_dir[/bold] gets config.yaml, metrics.jsonl, train.log, tb/ and checkpoints; starting again
    continues from the last one.
    """
    from launcher import worker

    inside = started_by_torchrun()
    settings = load_config(config, context.args, notice=_notice if os.environ.get("RANK", "0") == "0" else _nothing)
    environment = detect()
    if inside:
        _check_world(settings, environment.world_size)
        worker.die_with_parent()
        raise typer.Exit(worker.main(settings, environment))
    _check_world(settings, settings.launch.nproc_per_node)
    if settings.launch.nproc_per_node == 1:
        raise typer.Exit(worker.main(settings, environment))
    from launcher.local import launch

    raise typer.Exit(launch(settings))


@app.command(context_settings=_OVERRIDES)
def check(
    context: typer.Context,
    config: ConfigPath,
    world_size: Annotated[
        int | None, typer.Option("--world-size", "-n", min=1, help="Ranks; default: launch.nproc_per_node.")
    ] = None,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print every key with its value.")] = False,
) -> None:
    """Validate CONFIG and print its layout, without starting anything.

    Which ranks form which group, which experts live where, and how many parameters each rank holds.
    """
    from launcher.layout_report import print_report

    settings = load_config(config, context.args, notice=_notice)
    if show_config:
        print(dump_config(settings), end="")
        return
    print_report(settings, world_size or settings.launch.nproc_per_node)


def _check_world(config: Config, world_size: int) -> None:
    from moe_dist.parallel.layout import Layout

    Layout.of(config, world_size)


def _notice(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[dim]note: {escape(text)}[/dim]", highlight=False)


def _nothing(text: str) -> None:
    pass


def main() -> None:
    """Entry point: errors are one line and exit code 2, Ctrl-C is 130, nothing shows a stack trace."""
    try:
        app()
    except ConfigError as error:
        print(f"moe-dist: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("moe-dist: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
