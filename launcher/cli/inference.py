"""What the commands that use a model have in common. Imports no torch."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import typer

from launcher.backends.command import for_world
from launcher.cli.paths import expanded
from launcher.connect.environment import detect, started_by_torchrun
from launcher.connect.rank_job import Inference

_MODEL = typer.Argument(
    metavar="MODEL",
    callback=expanded,
    help="Run folder or URL (its newest step), one checkpoint, or a Hugging Face folder.",
)
Model = Annotated[str, _MODEL]
AnyModel = Annotated[str | None, _MODEL]
Nproc = Annotated[int, typer.Option("--nproc", "-n", min=1, help="Ranks on this machine; key=value says the layout.")]
Step = Annotated[int | None, typer.Option(min=0, help="Which step of a run; default: the newest.")]
AdapterPath = Annotated[
    str | None,
    typer.Option(
        metavar="CHECKPOINT",
        callback=expanded,
        help="Adapters beside MODEL, a Hugging Face folder: a checkpoint or run that trained them, or PEFT's folder.",
    ),
]
Dtype = Annotated[Literal["fp32", "bf16"], typer.Option(help="Type of the weights.")]
ExpertCacheGb = Annotated[
    float | None, typer.Option(help="Keep so much of the experts where the model computes, the rest elsewhere.")
]
CachePolicy = Annotated[Literal["lru", "lfu"], typer.Option(help="Which expert leaves first.")]


def run_inference(
    verb: str,
    model: str,
    overrides: list[str],
    options: dict[str, Any],
    nproc: int,
    step: int | None,
    dtype: str,
    keys: list[str] | None,
    adapter: str | None = None,
) -> int:
    """Find the model, and do what `verb` says on all ranks: here, where there is one. Returns the exit code."""
    from moe_dist.pretrained.inference import find_model

    under_torchrun = started_by_torchrun()
    first = os.environ.get("RANK", "0") == "0"
    how: dict[str, Any] = {"step": step, "keys": keys or (), "nproc": nproc, "dtype": dtype}
    how["adapter"] = adapter
    found = find_model(model, overrides, **how, check=first)
    wanted = Inference(
        verb=verb,
        checkpoint=None if found.checkpoint is None else str(found.checkpoint),
        keys=tuple(keys or ()),
        options=options,
    )
    if under_torchrun:
        from launcher.rank.worker import run_under_torchrun

        environment = detect()
        run_under_torchrun(for_world(found.config, environment.world_size), environment, wanted)
    config = for_world(found.config, nproc)
    if nproc == 1:
        from launcher.rank.worker import main

        return main(config, detect(), wanted)
    from launcher.backends.local import launch

    return launch(config, wanted)
