"""`moe-dist verify`: the proof that layouts compute what one process computes. Imports no torch."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from launcher.cli.run_file import ConfigPath, become_rank, notice_once
from moe_dist.config import load_config


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
    from launcher.cli.proving import prove
    from launcher.connect.rank_job import Proof

    become_rank()
    settings = load_config(config, context.args, notice=notice_once)
    overrides = " ".join(map(shlex.quote, context.args))
    command = f"moe-dist verify {shlex.quote(config)}{' ' * bool(overrides)}{overrides} -n {world_size}"
    proof = Proof("life" if life else layouts, plant, as_json, seed, minutes, command=command)
    raise typer.Exit(prove(settings, proof, world_size))
