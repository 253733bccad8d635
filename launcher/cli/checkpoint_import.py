"""`moe-dist checkpoint import`: a model from elsewhere as step 0 of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.checkpoint import plainly
from launcher.cli.paths import expanded


def import_(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="DIR", callback=expanded, help="As model.from_pretrained; or an export of --to safetensors."
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="RUN", callback=expanded, help="Run folder to make.")
    ],
) -> None:
    """Make a run folder whose checkpoint of step 0 holds the weights of a folder.

    [bold]moe-dist train RUN/config.yaml[/bold] starts from it, in any layout, as it would with from_pretrained, and
    needs the folder no more. Every value is read again and compared before the checkpoint stays.

    [dim]Example:[/dim]  moe-dist checkpoint import path/to/Qwen3-30B-A3B --output outputs/tuned
    """
    from launcher.cli.checkpoint_table import size
    from moe_dist.config.model_source import local_folder
    from moe_dist.pretrained.importing import import_checkpoint

    source = local_folder(folder, Path(folder), folder, lambda text: print(text, file=sys.stderr))
    with plainly():
        done = import_checkpoint(source, Path(output))
    amount = f"{size(done.num_bytes)} in {done.num_files} file{'s' if done.num_files > 1 else ''}"
    print(f"{done.checkpoint}: {done.num_tensors} tensors, {amount}; verified, every value is that of {folder}")
    print(f"go on with: moe-dist train {output}/config.yaml")
