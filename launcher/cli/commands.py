"""What `moe-dist` can be asked to do. Torch is imported by the ranks, never here."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from launcher.backends.command import for_world
from launcher.cli import checkpoint
from launcher.cli.checkpoint_import import import_
from launcher.cli.completion import RunCommand
from launcher.cli.data import app as data_app
from launcher.cli.evaluate import evaluate, experts
from launcher.cli.export import export
from launcher.cli.generate import generate
from launcher.cli.init import init
from launcher.cli.launch import app as launch_app
from launcher.cli.paths import expanded
from launcher.cli.plan import plan
from launcher.cli.serve import serve
from launcher.cli.sweep import sweep
from launcher.cli.upcycle import upcycle
from launcher.connect.environment import (
    detect,
    join_slurm,
    let_the_first_speak,
    refuse_half_a_torchrun,
    started_by_torchrun,
)
from launcher.connect.exit_codes import EXIT_CONFIG, EXIT_FAILED
from launcher.connect.mpi import join_mpi
from launcher.connect.output import complain
from launcher.connect.rank_job import LAUNCHER
from moe_dist import __version__
from moe_dist.config import Config, ConfigError, dump_config, load_config
from moe_dist.config.vocabulary import vocabulary_needed

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
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/demo.yaml.")]


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


@app.command(cls=RunCommand, context_settings=_OVERRIDES)
def train(context: typer.Context, config: ConfigPath) -> None:
    """Train what CONFIG describes.

    Starts [bold]launch.nproc_per_node[/bold] ranks on this machine; inside torchrun, and as one of several tasks
    of srun, it is the rank that they started. Keys are overridden by [bold]key=value[/bold] after the file:
    train.max_steps=100, --learning_rate=1e-3.

    The run folder [bold]train.output_dir[/bold] gets config.yaml, metrics.jsonl, train.log, tb/ and
    checkpoints; starting again continues from the last one.

    [dim]Example:[/dim]  moe-dist train configs/demo.yaml train.max_time=60
    """
    _join()
    inside = started_by_torchrun()
    notice = _notice if os.environ.get("RANK", "0") == "0" else _nothing
    settings = load_config(config, context.args, notice=notice)
    if inside:
        from launcher.rank.worker import run_under_torchrun

        environment = detect()
        if settings.train.auto_find_batch_size:
            notice("train.auto_find_batch_size: not under this launcher, where lack of memory ends the run")
        settings = for_world(settings, environment.world_size, notice, per_host=environment.local_world_size)
        run_under_torchrun(settings, environment)
    settings = for_world(settings, settings.launch.nproc_per_node, notice)
    from launcher.backends.local import launch
    from launcher.cli.memory_check import refuse_what_cannot_fit

    if LAUNCHER in os.environ:  # a server that has started this: when it has gone, save and end
        from launcher.rank.worker import die_with_parent

        die_with_parent(int(os.environ.pop(LAUNCHER)), signal.SIGTERM)
    refuse_what_cannot_fit(settings, config, settings.launch.nproc_per_node)
    _refuse_what_is_missing(settings)
    raise typer.Exit(launch(settings))


@app.command(cls=RunCommand, context_settings=_OVERRIDES)
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
    settings = load_config(config, overrides, notice=_notice)
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
        settings = for_world(settings, ranks, _notice, per_host=min(ranks, settings.launch.nproc_per_node))
    refuse_what_cannot_fit(settings, config, ranks, here=ranks <= settings.launch.nproc_per_node, named=True)
    _refuse_what_is_missing(settings)
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


@app.command(cls=RunCommand, context_settings=_OVERRIDES)
def verify(
    context: typer.Context,
    config: ConfigPath,
    world_size: Annotated[int, typer.Option("--world-size", "-n", min=1, help="Ranks started on this machine.")] = 4,
    layouts: Annotated[
        str,
        typer.Option(
            metavar="all|quick|life|NAMES", help="Names such as ep2-zero3-acc2, pp2-1f1b-ep1-zero1+tied+bias."
        ),
    ] = "all",
    plant: Annotated[
        str | None,
        typer.Option("--inject-bug", "--plant", metavar="BUG", help="Put a known bug in: the proof must fail."),
    ] = None,
    life: Annotated[bool, typer.Option("--life", help="Lives of runs only, as --layouts life.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Chooses other cases with the same coverage.")] = 0,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Go on for so long with cases drawn at random from --seed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Numbers for programs on standard output.")] = False,
) -> None:
    """Prove that every layout computes what one process computes.

    Trains small models under many layouts (pipelines, experts, sharding, accumulation, recomputation, DeepSpeed), with
    every feature of a training in turn, and compares losses, gradients, norm, weights, load of every expert, evaluation
    and initial weights with one process, in float64 where that can be. [bold]quick[/bold]: every value of a feature
    and layout once; [bold]all[/bold]: every pair of them, and whole lives of runs, evaluated, saved, stopped, resumed
    in other layouts. Exit code 1 when anything differs, 5 when nothing does with a bug planted.

    [dim]Example:[/dim]  moe-dist verify configs/demo.yaml --layouts quick
    """
    from launcher.cli.verify import prove
    from launcher.connect.rank_job import Proof

    _join()
    settings = load_config(config, context.args, notice=_notice if os.environ.get("RANK", "0") == "0" else _nothing)
    overrides = " ".join(map(shlex.quote, context.args))
    command = f"moe-dist verify {shlex.quote(config)}{' ' * bool(overrides)}{overrides} -n {world_size}"
    proof = Proof("life" if life else layouts, plant, as_json, seed, minutes, command=command)
    raise typer.Exit(prove(settings, proof, world_size))


@app.command(cls=RunCommand, context_settings=_OVERRIDES)
def profile(
    context: typer.Context,
    config: ConfigPath,
    steps: Annotated[int, typer.Option(min=1, help="Steps to profile, after 3 to warm up.")] = 5,
    compute: Annotated[
        bool, typer.Option("--compute", help="Measure where the time goes; so it is without --memory too.")
    ] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Measure what is kept for backward.")] = False,
    folder: Annotated[
        str | None,
        typer.Option(
            "--report", metavar="DIR", callback=expanded, help="Folder for profile.html; default: the run folder."
        ),
    ] = None,
    _form: Annotated[Literal["html"], typer.Option("--format", help="What is written; there is one form.")] = "html",
) -> None:
    """Show where the time and the memory of a training step go.

    Runs a few steps of CONFIG on [bold]launch.nproc_per_node[/bold] ranks under torch.profiler and writes profile.html
    into the run folder: time by phase and by layer, all-to-all against compute, top operators, memory by owner, the
    layout. Nothing is logged, saved or resumed.

    [dim]Example:[/dim]  moe-dist profile configs/demo.yaml --compute --memory --steps 10 --report profiles
    """
    from launcher.connect.rank_job import Profiling

    _join()
    settings = load_config(config, context.args, notice=_notice if os.environ.get("RANK", "0") == "0" else _nothing)
    wanted = Profiling(steps=steps, compute=compute or not memory, memory=memory, folder=folder)
    if started_by_torchrun():
        from launcher.rank.worker import run_under_torchrun

        environment = detect()
        settings = for_world(settings, environment.world_size, per_host=environment.local_world_size)
        run_under_torchrun(settings, environment, wanted)
    settings = for_world(settings, settings.launch.nproc_per_node, _notice)
    from launcher.backends.local import launch

    raise typer.Exit(launch(settings, wanted))


app.command(cls=RunCommand, context_settings=_OVERRIDES)(sweep)
app.command(cls=RunCommand, context_settings=_OVERRIDES)(generate)
app.command(cls=RunCommand, context_settings=_OVERRIDES)(serve)
app.command(cls=RunCommand, context_settings=_OVERRIDES)(plan)
app.command(cls=RunCommand, context_settings=_OVERRIDES)(evaluate)
app.command(cls=RunCommand, context_settings=_OVERRIDES)(experts)
app.command()(init)
app.command()(export)
app.command()(upcycle)


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", callback=expanded, help="Run folders, such as outputs/demo.")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", callback=expanded, help="File to write; default: report.html in the run folder."
        ),
    ] = None,
) -> None:
    """Write report.html about one run, or several side by side.

    One file with everything in it: loss, throughput, what a plan says of the run beside what it measured, the load of
    every expert at every step, checkpoints, and findings in words. It opens in any browser, without a network. For
    several runs the default is report.html in the current folder.

    [dim]Example:[/dim]  moe-dist report outputs/demo
    """
    from moe_dist.monitor.report.page import write_report  # a plotting library, only when there is something to plot
    from moe_dist.plan.measured import TITLES, comparison, measured_run

    print(write_report(runs, output, lambda run: (TITLES, [one.row for one in comparison(measured_run(run))])))


@app.command()
def doctor(
    run: Annotated[str, typer.Argument(metavar="RUN", callback=expanded, help="Run folder, such as outputs/demo.")],
    as_json: Annotated[bool, typer.Option("--json", help="Findings for programs on standard output.")] = False,
) -> None:
    """Say what is wrong with a run, finished or still running, and which key helps.

    Dead experts and collapse, spikes, divergence and a flat loss, overfitting, slow data, slow checkpoints, stragglers,
    low utilisation: the findings of its report. Exit code 0 when nothing needs attention, 1 when something does.

    [dim]Example:[/dim]  moe-dist doctor outputs/demo
    """
    from moe_dist.monitor.health.doctor import findings
    from moe_dist.monitor.run_log import read_run

    found = findings(read_run(run))
    if as_json:
        from moe_dist.monitor.sinks.jsonl import json_safe

        print(json.dumps([json_safe(finding.to_json()) for finding in found], indent=1))
    else:
        for finding in found:
            print(f"{finding.severity}: {finding}")
    alarming = any(finding.severity != "info" for finding in found)
    if not alarming and not as_json:
        print("Nothing that needs attention.")
    raise typer.Exit(EXIT_FAILED if alarming else 0)


def _join() -> None:
    """A process that srun or mpirun has started as one of several becomes a rank."""
    join_slurm()
    join_mpi()
    refuse_half_a_torchrun()


def _refuse_what_is_missing(settings: Config) -> None:
    """Raises ConfigError where `train.kernels` cannot run on the devices here, or a dispatcher's package is missing."""
    if settings.parallel.ep_size > 1:
        from moe_dist.parallel.dispatch_choice import require_installed

        require_installed(settings.parallel.dispatcher)
    if settings.train.kernels != "torch":
        from moe_dist.models.kernel_choice import require_kernels
        from moe_dist.plan.machine import device_kind

        require_kernels(settings.train.kernels, device_kind(settings))


def _notice(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[dim]note: {escape(text)}[/dim]", highlight=False)


def _nothing(text: str) -> None:
    pass
