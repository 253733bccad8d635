"""What `moe-dist` can be asked to do. Torch is imported by the ranks, never here."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from launcher.cli import checkpoint
from launcher.cli.check import check
from launcher.cli.checkpoint_import import import_
from launcher.cli.completion import RunCommand
from launcher.cli.data import app as data_app
from launcher.cli.evaluate import evaluate, experts
from launcher.cli.export import export
from launcher.cli.findings import doctor, report
from launcher.cli.generate import generate
from launcher.cli.init import init
from launcher.cli.launch import app as launch_app
from launcher.cli.plan import plan
from launcher.cli.profile import profile
from launcher.cli.run_file import OVERRIDES
from launcher.cli.serve import serve
from launcher.cli.sweep import sweep
from launcher.cli.train import train
from launcher.cli.upcycle import upcycle
from launcher.cli.verify import verify
from launcher.connect.environment import let_the_first_speak
from launcher.connect.exit_codes import EXIT_CONFIG
from launcher.connect.output import complain
from moe_dist import __version__
from moe_dist.config import ConfigError

app = typer.Typer(
    name="moe-dist",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Train [bold]mixture-of-experts[/bold] language models: "
        "the same on a laptop and on a GPU cluster.\n\n"
        "[dim]Start here:[/dim]  moe-dist train configs/demo.yaml\n\n"
        "[dim]Without a checkout:[/dim]  moe-dist init runs; cd runs; moe-dist train demo.yaml\n\n"
        "[dim]Change anything:[/dim]  moe-dist train configs/demo.yaml learning_rate=1e-3 parallel.ep_size=1"
    ),
    epilog="Every key is explained in docs/configuration.md, starting and stopping in docs/running.md. "
    "Exit codes: 0 done, 1 failed, 2 the configuration or data cannot be used, 3 training stopped itself, "
    "75 stopped on request and saved, 130 Ctrl-C.",
)
checkpoint.app.command("import")(import_)
app.add_typer(checkpoint.app)
app.add_typer(data_app)
app.add_typer(launch_app)


def run() -> int:
    """Do what the command line asks; returns the exit code. What a person got wrong is one line and 2."""
    try:
        return app(standalone_mode=False) or 0
    except ConfigError as error:
        let_the_first_speak()
        text = str(error)
    except Exception as error:
        # Usage errors: their class moved between releases of typer, their way of speaking did not.
        if not hasattr(error, "format_message"):
            raise
        text = f"{_usage(error, sys.argv)} (moe-dist --help shows what there is)"
    complain(f"moe-dist: error: {text}")
    return EXIT_CONFIG


def _usage(error: Any, words: Sequence[str]) -> str:
    """What is wrong with the command line, in our words where those of the parser do not name the value."""
    text = " ".join(error.format_message().split())
    if "unable to parse string as an integer" not in text:
        return text
    names = tuple(getattr(getattr(error, "param", None), "opts", ()))
    for name, (word, after) in itertools.product(names, itertools.pairwise([*words, ""])):
        if word == name or word.startswith(f"{name}="):
            value = after if word == name else word.partition("=")[2]
            return f"{name} {value}: give a whole number"
    return text.replace("Input should be a valid integer, unable to parse string as an integer", "give a whole number")


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-v", help="Print the version and end.")] = False,
) -> None:
    if version:
        print(f"moe-dist {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), end="")
        raise typer.Exit


app.command(cls=RunCommand, context_settings=OVERRIDES)(train)
app.command(cls=RunCommand, context_settings=OVERRIDES)(check)
app.command(cls=RunCommand, context_settings=OVERRIDES)(verify)
app.command(cls=RunCommand, context_settings=OVERRIDES)(profile)
app.command(cls=RunCommand, context_settings=OVERRIDES)(sweep)
app.command(cls=RunCommand, context_settings=OVERRIDES)(generate)
app.command(cls=RunCommand, context_settings=OVERRIDES)(serve)
app.command(cls=RunCommand, context_settings=OVERRIDES)(plan)
app.command(cls=RunCommand, context_settings=OVERRIDES)(evaluate)
app.command(cls=RunCommand, context_settings=OVERRIDES)(experts)
app.command()(init)
app.command()(export)
app.command()(upcycle)
app.command()(report)
app.command()(doctor)
