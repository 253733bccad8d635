"""`moe-dist train`: ranks on this machine, or the rank that another launcher has started. Imports no torch."""

from __future__ import annotations

import os
import signal

import typer

from launcher.backends.command import for_world
from launcher.cli.run_file import ConfigPath, become_rank, notice_once, refuse_what_is_missing
from launcher.connect.environment import detect, started_by_torchrun
from launcher.connect.rank_job import LAUNCHER
from moe_dist.config import load_config


def train(context: typer.Context, config: ConfigPath) -> None:
    """Train what CONFIG describes.

    Starts [bold]launch.nproc_per_node[/bold] ranks on this machine; inside torchrun, and as one of several tasks
    of srun, it is the rank that they started. Keys are overridden by [bold]key=value[/bold] after the file:
    train.max_steps=100, --learning_rate=1e-3.

    The run folder [bold]train.output_dir[/bold] gets config.yaml, metrics.jsonl, train.log, tb/ and
    checkpoints; starting again continues from the last one.

    [dim]Example:[/dim]  moe-dist train configs/demo.yaml train.max_time=60
    """
    become_rank()
    inside = started_by_torchrun()
    settings = load_config(config, context.args, notice=notice_once)
    if inside:
        from launcher.rank.worker import run_under_torchrun

        environment = detect()
        if settings.train.auto_find_batch_size:
            notice_once("train.auto_find_batch_size: not under this launcher, where lack of memory ends the run")
        settings = for_world(settings, environment.world_size, notice_once, per_host=environment.local_world_size)
        run_under_torchrun(settings, environment)
    settings = for_world(settings, settings.launch.nproc_per_node, notice_once)
    from launcher.backends.local import launch
    from launcher.cli.memory_check import refuse_what_cannot_fit

    if LAUNCHER in os.environ:  # a server that has started this: when it has gone, save and end
        from launcher.rank.worker import die_with_parent

        die_with_parent(int(os.environ.pop(LAUNCHER)), signal.SIGTERM)
    refuse_what_cannot_fit(settings, config, settings.launch.nproc_per_node)
    refuse_what_is_missing(settings)
    raise typer.Exit(launch(settings))
