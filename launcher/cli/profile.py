"""`moe-dist profile`: a few steps under torch.profiler. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from launcher.backends.command import for_world
from launcher.cli.paths import expanded
from launcher.cli.run_file import ConfigPath, become_rank, notice, notice_once
from launcher.connect.environment import detect, started_by_torchrun
from moe_dist.config import load_config


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

    become_rank()
    settings = load_config(config, context.args, notice=notice_once)
    wanted = Profiling(steps=steps, compute=compute or not memory, memory=memory, folder=folder)
    if started_by_torchrun():
        from launcher.rank.worker import run_under_torchrun

        environment = detect()
        settings = for_world(settings, environment.world_size, per_host=environment.local_world_size)
        run_under_torchrun(settings, environment, wanted)
    settings = for_world(settings, settings.launch.nproc_per_node, notice)
    from launcher.backends.local import launch

    raise typer.Exit(launch(settings, wanted))
