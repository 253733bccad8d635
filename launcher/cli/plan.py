"""`moe-dist plan`: the layout of a run before a device is rented."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from launcher.cli.paths import expanded
from launcher.connect.exit_codes import EXIT_FAILED
from moe_dist.config import ConfigError, load_config
from moe_dist.plan.imbalance import ASSUMED

if TYPE_CHECKING:
    from moe_dist.plan.cluster import Cluster
    from moe_dist.plan.search import Plan

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def amount_of(text: str) -> int:
    """A number of tokens as people write it: 300000, 20B, 1.5T."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)([kMBT]?)", text)
    value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if value < 1:
        raise ConfigError(f"--tokens {text}: a number, such as 300000, 20B or 1.5T")
    return int(value)


def plan(
    context: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/qwen3_30b_a3b.yaml.")],
    gpus: Annotated[
        int | None, typer.Option("--gpus", "-n", min=1, help="Devices; default: launch.nproc_per_node.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Device: h100, h200, b200, a100, l40s or cpu; default: launch.cluster of CONFIG, else h100."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", callback=expanded, help="What is different on this cluster: hosts, links, price, failures."
        ),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Tokens to train on: 20B, 1T.")] = "1T",
    global_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences in a step; default: those of the run file on so many devices.")
    ] = None,
    imbalance: Annotated[
        float, typer.Option(min=1.0, help="Rows of the busiest expert as multiples of the mean (a run logs it).")
    ] = ASSUMED,
    price: Annotated[float | None, typer.Option(min=0.0, help="Money for one device and hour.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan for programs on standard output.")] = False,
    report: Annotated[
        str | None,
        typer.Option(metavar="FILE", callback=expanded, help="Write a page with memory, time and trade-offs."),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", callback=expanded, help="Measure this machine's device into a cluster file first."
        ),
    ] = None,
    calibrate_from: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            callback=expanded,
            help="Learn efficiencies from this run into the file of --calibrate; default: calibration.yaml in RUN.",
        ),
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", "--failures", help="Replay months with failures, and print their goodput.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of --simulate.")] = 0,
) -> None:
    """Find the layout a model should have on a cluster, before anything is started.

    Tries every layout that the model and so many devices allow, keeps those that fit, and ranks them by tokens per
    second: memory by purpose, time by purpose, what the whole training costs, the keys and the command to start it.
    Exit code 1 when nothing fits. What it can and cannot predict: docs/planning.md.

    [dim]Example:[/dim]  moe-dist plan configs/qwen3_30b_a3b.yaml --gpus 64 --gpu h100 --tokens 1T
    """
    from moe_dist.plan.cluster import cluster_of
    from moe_dist.plan.machine import named_cluster
    from moe_dist.plan.search import least_devices
    from moe_dist.plan.search import plan as search
    from moe_dist.plan.words import plan_facts, terminal_lines

    settings = load_config(config, context.args)
    number = gpus or settings.launch.nproc_per_node
    if calibrate_from is not None:
        cluster = str(_learn(Path(calibrate_from), calibrate, gpu, cluster))
    elif calibrate is not None:
        _calibrate(Path(calibrate), gpu or "h100")
        cluster = cluster or calibrate
    named = named_cluster(settings) if gpu is None and cluster is None else None
    machine = named or cluster_of(gpu, cluster)
    if price is not None:
        machine = machine.model_copy(update={"price_per_hour": price})
    wanted = amount_of(tokens)
    found = search(settings, number, machine, global_batch=global_batch, imbalance=imbalance)
    least = least_devices(settings, machine, number) if found.best is not None else None
    if as_json:
        print(json.dumps(plan_facts(config, found, machine, wanted, least), indent=1))
    else:
        print("\n".join(terminal_lines(config, found, machine, wanted, least)))
    if simulate and found.best is not None and not as_json:
        print("\n".join(["", *simulation_lines(found, machine, wanted, seed)]))
    if report is not None and found.best is not None:
        from moe_dist.plan.page import write_page  # a plotting library, only when there is something to plot

        print(f"\nPage: {write_page(Path(report), config, found, machine, wanted)}", flush=True)
    if found.best is None:
        raise typer.Exit(EXIT_FAILED)


def _learn(folder: Path, calibrate: str | None, gpu: str | None, cluster: str | None) -> Path:
    """Write what a run has measured into a cluster file, over what is there, and say how far the plan was off."""
    from moe_dist.monitor.run_log import read_run
    from moe_dist.plan.cluster import cluster_of, read_cluster
    from moe_dist.plan.measured import comparison, learned, measured_run

    path = Path(calibrate) if calibrate is not None else folder / "calibration.yaml"
    before = path if path.is_file() else None if cluster is None else Path(cluster)
    known = None if before is None and gpu is None else cluster_of(gpu, before)
    run = measured_run(read_run(folder), known)
    keys = {} if before is None else read_cluster(before)
    keys |= {"gpu": run.cluster.gpu, "devices_per_host": run.cluster.devices_per_host} | learned(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({key: _rounded(value) for key, value in keys.items()}, sort_keys=False)
    path.write_text(f"# Measured by moe-dist plan --calibrate-from {folder}\n{text}", "utf-8")
    for one in comparison(run):
        print("{:<40} planned {:>12}, measured {:>12} ({})".format(*one.row), file=sys.stderr)
    print(f"load imbalance: {run.imbalance:.2f} (--imbalance)\nlearned: {path}", file=sys.stderr)
    return path


def _rounded(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _calibrate(path: Path, gpu: str) -> None:
    """Measure one device of this machine, and write what was found; links stay as the device has them."""
    import torch

    from moe_dist.plan.calibration import measured_device

    kind = "cpu" if gpu == "cpu" else "cuda"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--calibrate {path}: there is no CUDA device here to measure as --gpu {gpu}; give --gpu cpu")
    torch.set_num_threads(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"gpu: {gpu}"]
    lines += [f"{key}: {value:.6g}" for key, value in measured_device(torch.device(kind)).items()]
    path.write_text("\n".join([f"# Measured by moe-dist plan --calibrate, --gpu {gpu}", *lines]) + "\n", "utf-8")
    print(f"measured: {path}", file=sys.stderr)


def simulation_lines(found: Plan, cluster: Cluster, tokens: int, seed: int, months: int = 100) -> list[str]:
    """Months of the best layout replayed, with the interval of the plan and with others."""
    from moe_dist.plan.failures import quantiles, replay
    from moe_dist.plan.words import bill, duration, reliability

    assert found.best is not None
    run, planned = reliability(found.best, cluster), bill(found.best, cluster, tokens)
    lines = [
        f"{months} months replayed from seed {seed}; a failure every {duration(run.mtbf)}, "
        f"a checkpoint stops training for {duration(run.save)}, a restart takes {duration(run.restart)}:",
        f"  {'checkpoint every':<20}{'goodput':>9}{'5 % worst':>11}{'lost':>8}{'saving':>8}{'restarts':>10}{'slow':>7}"
        f"{'failures':>10}",
    ]
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        interval = planned.interval * factor
        all_months = [replay(run, interval, seed * 1_000_003 + month) for month in range(months)]
        low, middle, _ = quantiles([month.goodput for month in all_months])
        means = [
            sum(getattr(month, name) for month in all_months) / months
            for name in ("lost", "saving", "restarting", "slow", "failures")
        ]
        lines.append(
            f"  {duration(interval):<20}{middle:>9.1%}{low:>11.1%}{means[0]:>8.1%}{means[1]:>8.1%}{means[2]:>10.1%}"
            f"{means[3]:>7.1%}{means[4]:>10.1f}"
        )
    return lines
