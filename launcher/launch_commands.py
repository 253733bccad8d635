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


@app.command("slurm", context_settings=_OVERRIDES)
def slurm(
    context: typer.Context,
    config: ConfigPath,
    nodes: Annotated[int, typer.Option("--nodes", "-N", min=1, help="Nodes.")] = 1,
    ntasks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each node; default: launch.nproc_per_node.")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option("--cpus-per-task", "-c", min=1, help="CPUs of a rank.")] = None,
    gpus_per_node: Annotated[Text, typer.Option(help="GPUs of a node, such as 8 or h100:8.")] = None,
    mem: Annotated[Text, typer.Option(help="Memory of a node, such as 500G.")] = None,
    time: Annotated[Text, typer.Option("--time", "-t", help="Longest time of one start, such as 08:00:00.")] = None,
    partition: Annotated[Text, typer.Option("--partition", "-p", help="Partition.")] = None,
    account: Annotated[Text, typer.Option("--account", "-A", help="Account.")] = None,
    qos: Annotated[Text, typer.Option(help="Quality of service.")] = None,
    job_name: Annotated[Text, typer.Option("--job-name", "-J", help="Name; default: moe-dist.")] = None,
    array: Annotated[Text, typer.Option("--array", "-a", help="Seeds, a job for each: 1-5, or 1-20%4.")] = None,
    srun: Annotated[bool, typer.Option("--srun", help="Ranks are tasks of srun, instead of torchrun's.")] = False,
    sbatch: Annotated[list[str] | None, typer.Option(metavar="OPTION", help="One more option for sbatch.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Submit the training of CONFIG to Slurm.

    It saves and goes back into the queue when its time is up or a node is lost, until it is done.

    [dim]Example:[/dim]  moe-dist launch slurm configs/demo.yaml --nodes 2 --ntasks-per-node 8 --gpus-per-node 8
    --time 08:00:00
    """
    from launcher.slurm import Request, followed, plan, submit

    settings = load_config(config, context.args, notice=_notice)
    request = Request(
        nodes=nodes,
        ntasks_per_node=ntasks_per_node or settings.launch.nproc_per_node,
        cpus_per_task=cpus_per_task,
        gpus_per_node=gpus_per_node,
        mem=mem,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        job_name=job_name,
        array=array,
        srun=srun,
        options=tuple(sbatch or ()),
    )
    job = plan(config, context.args, settings, request)
    if dry_run:
        print(f"{job}\n\n# {job.script}\n{job.script.read_text()}", end="")
    else:
        print(followed(job, submit(job)))


@app.command("ray", context_settings=_OVERRIDES)
def ray(
    context: typer.Context,
    config: ConfigPath,
    address: Annotated[Text, typer.Option(help="Cluster: auto, local or HOST:PORT; default: RAY_ADDRESS.")] = None,
    num_workers: Annotated[
        Text, typer.Option("--num-workers", "-n", metavar="N|MIN:MAX", help="Ranks; default: launch.nproc_per_node.")
    ] = None,
    cpus_per_worker: Annotated[float, typer.Option(help="CPUs of a rank.")] = 1.0,
    gpus_per_worker: Annotated[
        int | None, typer.Option(min=0, max=1, help="GPUs of a rank; default: 1 with launch.device=cuda.")
    ] = None,
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="Lost workers or nodes to survive; default: launch.max_restarts.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train CONFIG with Ray Train, on a Ray cluster or on this machine.

    A lost worker or node restarts the run from its newest checkpoint; with --num-workers MIN:MAX and parallel.elastic
    on as many ranks as there is room for.

    [dim]Example:[/dim]  moe-dist launch ray configs/demo.yaml --num-workers 8 --gpus-per-worker 1
    """
    from launcher.ray import Request, plan

    request = Request(address, num_workers, cpus_per_worker, gpus_per_worker, max_failures)
    asked, notes = plan(load_config(config, context.args, notice=_notice), request)
    for note in notes:
        _notice(note)
    if dry_run:
        print(asked)
        return
    from launcher.ray_driver import launch

    raise typer.Exit(launch(asked))


def _notice(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[dim]note: {escape(text)}[/dim]", highlight=False)
