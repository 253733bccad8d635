"""What commands share that read a run file: its argument, notes on what is in it, and ranks that others start."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from launcher.connect.environment import join_slurm, refuse_half_a_torchrun
from launcher.connect.mpi import join_mpi
from moe_dist.config import Config

OVERRIDES: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Of the parser: what it does not know may be a key of the run file."""
ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/demo.yaml.")]


def become_rank() -> None:
    """A process that srun or mpirun has started as one of several becomes a rank."""
    join_slurm()
    join_mpi()
    refuse_half_a_torchrun()


def notice(text: str) -> None:
    """A note on standard error."""
    Console(stderr=True, soft_wrap=True).print(f"[dim]note: {escape(text)}[/dim]", highlight=False)


def notice_once(text: str) -> None:
    """As `notice`, from the first of the ranks that others have started."""
    if os.environ.get("RANK", "0") == "0":
        notice(text)


def refuse_what_is_missing(settings: Config) -> None:
    """Raises ConfigError where `train.kernels` cannot run on the devices here, or a dispatcher's package is missing."""
    if settings.parallel.ep_size > 1:
        from moe_dist.parallel.dispatch_choice import require_installed

        require_installed(settings.parallel.dispatcher)
    if settings.train.kernels != "torch":
        from moe_dist.models.kernel_choice import require_kernels
        from moe_dist.plan.machine import device_kind

        require_kernels(settings.train.kernels, device_kind(settings))
