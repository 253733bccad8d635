"""What the commands that use a model have in common. Imports no torch."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import typer

from launcher.backends.command import for_world
from launcher.cli.paths import expanded
from launcher.connect.environment import detect, started_by_torchrun
from launcher.connect.rank_job import Inference
from moe_dist.config import ConfigError

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
Int8 = Annotated[
    bool, typer.Option("--int8", help="Weights of experts and linear maps as int8, a scale for each output.")
]
ExpertCacheGb = Annotated[
    float | None, typer.Option(help="Keep so much of the experts where the model computes, the rest elsewhere.")
]
CachePolicy = Annotated[Literal["lru", "lfu"], typer.Option(help="Which expert leaves first.")]
ExpertFolder = Annotated[
    str | None, typer.Option(callback=expanded, help="Folder for experts' files; default: host memory.")
]
Prefetch = Annotated[bool, typer.Option("--prefetch", help="Fetch the next layer's experts ahead.")]


def expert_cache(size_gb: float | None, policy: str, folder: str | None, prefetch: bool) -> dict[str, Any]:
    """Arguments of the engine. Raises ConfigError for what only a cache has."""
    if size_gb is None:
        for name, given in (("--expert-folder", folder), ("--prefetch", prefetch)):
            if given:
                raise ConfigError(f"{name}: only with --expert-cache-gb")
        return {}
    how = {"expert_cache_size_gb": size_gb, "cache_policy": policy}
    return how | {"expert_folder": folder, "prefetch": prefetch}


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
    int8: bool = False,
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
        int8=int8,
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
