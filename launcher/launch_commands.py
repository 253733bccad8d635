"""`moe-dist launch ...`: the same training, started by something else."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moe_dist.config_loading import load_config

app = typer.Typer(name="launch", help="Train CONFIG on a cluster: check it, submit it.")
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/demo.yaml.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted; submit nothing.")]
Text = str | None


@app.callback(invoke_without_command=True)
def top(context: typer.Context) -> None:
    """Train CONFIG on a cluster: check it, submit it."""
    if context.invoked_subcommand is None:
        print(context.get_help(), end="")
        raise typer.Exit


@app.command("k8s", context_settings=_OVERRIDES)
def k8s(
    context: typer.Context,
    config: ConfigPath,
    nodes: Annotated[int | None, typer.Option(min=1, help="Pods; default: as the manifests say.")] = None,
    nproc_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks per pod; default: likewise.")] = None,
    namespace: Annotated[Text, typer.Option(help="Namespace; default: kubectl's.")] = None,
    image: Annotated[Text, typer.Option(help="Image with moe-dist in it; see k8s/Dockerfile.")] = None,
    overlay: Annotated[
        Text, typer.Option(metavar="NAMES", help="Of k8s/components/, with commas, such as gpu,jobset.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train CONFIG on Kubernetes: the manifests of k8s/ with this run in them, given to kubectl.

    [dim]Example:[/dim]  moe-dist launch k8s configs/demo.yaml --nodes 2 --dry-run
    """
    from launcher.kubernetes import apply, for_pods, manifests

    notes: list[str] = []
    settings = for_pods(load_config(config, context.args, notice=notes.append), notes.append)
    text = manifests(settings, overlay, nodes, nproc_per_node, namespace, image)
    for note in notes:
        _notice(note)
    if dry_run:
        print(text, end="")
        return
    raise typer.Exit(apply(text))


def _notice(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[dim]note: {escape(text)}[/dim]", highlight=False)
