"""`moe-dist sweep`: the same training with every combination of some values."""

from __future__ import annotations

from typing import Annotated

import typer


def sweep(
    context: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/demo.yaml.")],
    metric: Annotated[str, typer.Option(help="What trials are compared by: loss, eval/loss, ...")] = "eval/loss",
    mode: Annotated[str, typer.Option(help="The best is the smallest (min) or largest (max).")] = "min",
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Trials at a time; default: what fits.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster: auto, local or HOST:PORT.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials; train nothing.")] = False,
) -> None:
    """Train CONFIG with every combination of values, by Ray Tune.

    Keys are given as for train, with commas between the values to try; quotes and brackets hold together what is one
    value: data.path="'a,b.txt',c.txt". Each trial is a run in a folder of its own under [bold]train.output_dir[/bold],
    on launch.nproc_per_node ranks. The same command again goes on with what is left.

    [dim]Example:[/dim]  moe-dist sweep configs/demo.yaml learning_rate=1e-4,3e-4,1e-3 num_experts=8,16 max_time=60
    """
    from launcher.connect.environment import ray_address
    from launcher.sweep.plan import plan, write_results

    asked = plan(config, context.args, metric, mode, max_concurrent)
    address = ray_address(address)
    if dry_run:
        for trial in asked.trials:
            needs = ", ".join(f"{count:g} {name.upper()}" for name, count in trial.resources.items())
            print(f"{trial.config.train.output_dir}  ({needs})")
        return
    from launcher.sweep.driver import train

    code = train(asked, address)
    from launcher.sweep.report import print_table, write_page

    print_table(asked)
    print(f"{write_results(asked)}\n{write_page(asked)}")
    raise typer.Exit(code)
