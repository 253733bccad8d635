"""`moe-dist launch ...`: the same training, started by something else."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from launcher.cli.completion import RunCommand
from launcher.cli.paths import expanded
from launcher.cli.run_file import OVERRIDES, ConfigPath, notice
from moe_dist.config import load_config

if TYPE_CHECKING:
    from launcher.backends.command import Start

app = typer.Typer(name="launch", help="Train CONFIG, started by something else: check it, start it.")
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be started; start nothing.")]
Text = str | None


@app.callback(invoke_without_command=True)
def top(context: typer.Context) -> None:
    """Train CONFIG, started by something else: check it, start it."""
    if context.invoked_subcommand is None:
        print(context.get_help(), end="")
        raise typer.Exit


@app.command("local", cls=RunCommand, context_settings=OVERRIDES)
def local(context: typer.Context, config: ConfigPath, dry_run: DryRun = False) -> None:
    """Train CONFIG on this machine: `moe-dist train`, which can be looked at first.

    [dim]Example:[/dim]  moe-dist launch local configs/demo.yaml --dry-run
    """
    from launcher.backends.command import TRAIN, Start, chosen, for_world
    from launcher.supervise.processes import rank_environment

    settings = load_config(config, context.args, notice=notice)
    settings = for_world(settings, settings.launch.nproc_per_node, notice)
    words = [*context.args, *chosen(settings)]
    _start(Start(rank_environment(settings), (sys.executable, *TRAIN, config, *words)), dry_run)


@app.command("torchrun", cls=RunCommand, context_settings=OVERRIDES)
def torchrun(
    context: typer.Context,
    config: ConfigPath,
    nnodes: Annotated[str, typer.Option(envvar="PET_NNODES", help="Machines, or MIN:MAX for an elastic run.")] = "1",
    nproc_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each machine; default: launch.nproc_per_node.")
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(min=0, envvar=["PET_NODE_RANK", "JOB_COMPLETION_INDEX"], help="0 where the machines meet."),
    ] = None,
    rdzv_endpoint: Annotated[
        Text, typer.Option(envvar="PET_RDZV_ENDPOINT", help="HOST:PORT where the machines meet, the same on each.")
    ] = None,
    rdzv_id: Annotated[
        Text, typer.Option(envvar="PET_RDZV_ID", help="Name of the run there; default: from train.output_dir.")
    ] = None,
    rdzv_conf: Annotated[Text, typer.Option(help="More of torchrun's rendezvous: read_timeout=60.")] = None,
    local_addr: Annotated[Text, typer.Option(help="This machine's address; default: towards the endpoint.")] = None,
    max_restarts: Annotated[
        int | None, typer.Option(min=0, help="Starts in a row without progress; default: launch.max_restarts.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(metavar="OPTION", help="One more option for torchrun.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Train CONFIG with torchrun: on this machine, or as one of several that each run the same line.

    [dim]Example:[/dim]  moe-dist launch torchrun configs/demo.yaml --nnodes 2 --rdzv-endpoint host0:29400
    """
    from launcher.backends.torchrun import Request, plan

    settings = load_config(config, context.args, notice=notice)
    asked = (nnodes, nproc_per_node, node_rank, rdzv_endpoint, rdzv_id, rdzv_conf, local_addr, max_restarts)
    _start(plan(config, context.args, settings, Request(*asked, tuple(option or ())), notice), dry_run)


@app.command("mpi", cls=RunCommand, context_settings=OVERRIDES)
def mpi(
    context: typer.Context,
    config: ConfigPath,
    ranks: Annotated[
        int | None, typer.Option("--ranks", "-n", min=1, help="Default: all of --hosts, or launch.nproc_per_node.")
    ] = None,
    hosts: Annotated[Text, typer.Option(help="Machines with their ranks, such as node1:8,node2:8.")] = None,
    hostfile: Annotated[Text, typer.Option(callback=expanded, help="A file with them, in mpirun's own format.")] = None,
    mpirun: Annotated[
        Text, typer.Option(callback=expanded, help="The program; default: beside this Python, else on the PATH.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(metavar="OPTION", help="One more option for mpirun.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Train CONFIG with mpirun, Open MPI's or MPICH's.

    [dim]Example:[/dim]  moe-dist launch mpi configs/demo.yaml --hosts node1:8,node2:8
    """
    from launcher.backends.mpirun import Request, plan

    settings = load_config(config, context.args, notice=notice)
    asked = Request(ranks, hosts, hostfile, mpirun, tuple(option or ()))
    _start(plan(config, context.args, settings, asked, notice), dry_run)


@app.command("k8s", cls=RunCommand, context_settings=OVERRIDES)
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
    from launcher.backends.kubernetes import apply, for_pods, manifests

    notes: list[str] = []
    settings = for_pods(load_config(config, context.args, notice=notes.append), notes.append)
    text = manifests(settings, overlay, nodes, nproc_per_node, namespace, image, notes.append)
    for note in notes:
        notice(note)
    if dry_run:
        print(text, end="")
        return
    raise typer.Exit(apply(text))


@app.command("slurm", cls=RunCommand, context_settings=OVERRIDES)
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
    from launcher.backends.slurm import Request, followed, plan, submit

    settings = load_config(config, context.args, notice=notice)
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
    job = plan(config, context.args, settings, request, notice)
    if dry_run:
        print(f"{job}\n\n# {job.script}\n{job.script.read_text()}", end="")
    else:
        print(followed(job, submit(job)))


def _start(start: Start, dry_run: bool) -> NoReturn:
    if dry_run:
        print(start)
        raise typer.Exit
    if start.variables:
        chosen = " ".join(f"{name}={value}" for name, value in start.variables.items())
        notice(f"set, since nobody has: {chosen}")
    start.become()


@app.command("ray", cls=RunCommand, context_settings=OVERRIDES)
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
    from launcher.backends.ray import Request, plan

    request = Request(address, num_workers, cpus_per_worker, gpus_per_worker, max_failures)
    asked, notes = plan(load_config(config, context.args, notice=notice), request)
    for note in notes:
        notice(note)
    if dry_run:
        print(asked)
        return
    from launcher.backends.ray_driver import launch

    raise typer.Exit(launch(asked))
