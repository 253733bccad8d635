"""`moe-dist report` and `moe-dist doctor`: what a run folder tells of its run. Imports no torch."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from launcher.cli.paths import expanded
from launcher.connect.exit_codes import EXIT_FAILED


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
