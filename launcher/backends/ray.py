"""`moe-dist launch ray`: what Ray Train is asked for, to the word. Imports neither Ray nor torch.

`ray_driver` asks it; `ray_rank` is what each of Ray's workers does.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.backends.command import for_world
from launcher.connect.environment import ray_address
from moe_dist.config import Config, ConfigError
from moe_dist.plan.elastic import fitting, global_batch

# Defaults of variables that Ray reads in the process that asks; what a person has set stays.
DEFAULTS = {
    "RAY_DEDUP_LOGS": "0",  # after a restart the same lines come from other processes
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a lost worker is noticed
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # how soon a node that is to go
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # how long for a worker on a node that has just died
    "RAY_USAGE_STATS_ENABLED": "0",
}
RESIZE_INTERVAL = 10.0
"""Seconds after which Ray looks again whether more workers have room."""
# Handed to the ranks, when they are set here.
_PASSED_ON = ("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MOE_DIST_DEBUG", "OMP_NUM_THREADS", "PYTHONPATH")
_PASSED_ON_PREFIX = "NCCL_"


@dataclass(frozen=True)
class Request:
    """What a person asks Ray for. None: as the configuration says."""

    address: str | None = None
    num_workers: str | None = None
    """N, or MIN:MAX."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: int | None = None
    max_failures: int | None = None


@dataclass(frozen=True)
class Plan:
    """What Ray is asked for."""

    config: Config
    address: str | None
    """As ray.init takes it; None: a cluster that this machine belongs to, else a new one on it."""
    worlds: tuple[int, ...]
    """Numbers of ranks that may train."""
    elastic: bool
    batch: int | None
    """Sequences in one step, whatever the number of ranks (elastic); else as the configuration says."""
    resources: dict[str, float]
    """Of one worker."""
    max_failures: int
    environment: dict[str, str]
    """Variables for the ranks."""
    token: str

    @property
    def num_workers(self) -> int | tuple[int, int]:
        """As in `ray.train.ScalingConfig`."""
        return (self.worlds[0], self.worlds[-1]) if self.elastic else self.worlds[-1]

    @property
    def use_gpu(self) -> bool:
        return self.resources.get("GPU", 0) > 0

    @property
    def name(self) -> str:
        return f"{self.config.train.output_dir.name}-{self.token}"

    @property
    def storage_path(self) -> Path:
        """Where Ray keeps notes of its own, on the disk that all nodes share; removed at the end."""
        return self.config.train.output_dir.absolute().parent / ".ray"

    def __str__(self) -> str:
        resize = f", elastic_resize_monitor_interval_s={RESIZE_INTERVAL:g}" if self.elastic else ""
        defaults = {name: os.environ.get(name, value) for name, value in DEFAULTS.items()}
        lines = [
            f"address      {self.address or 'the cluster that this machine belongs to, else a new one on it'}",
            f"ScalingConfig(num_workers={self.num_workers}, use_gpu={self.use_gpu}, "
            f"resources_per_worker={self.resources}{resize})",
            f"RunConfig(name={self.name!r}, storage_path={str(self.storage_path)!r})",
            f"FailureConfig(max_failures={self.max_failures})",
            f"ranks        {_worlds_text(self)}",
            f"Ray's own    {_assignments(defaults)}",
            f"ranks' own   {_assignments(self.environment) or 'as on the nodes'}",
            "each worker  python -m moe_dist rank, with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, "
            "MASTER_ADDR, MASTER_PORT",
        ]
        return "\n".join(lines)


def plan(config: Config, request: Request, environ: Mapping[str, str] = os.environ) -> tuple[Plan, list[str]]:
    """What `moe-dist launch ray` asks for, and sentences about what differs from the request.

    Raises ConfigError when it could not work.
    """
    address = ray_address(request.address, environ)
    low, high = _range(request.num_workers, config)
    elastic = low != high
    notes: list[str] = []
    batch = None
    if elastic and not config.parallel.elastic:
        raise ConfigError(
            f"--num-workers {low}:{high}: a run changes its layout only with parallel.elastic=true; "
            f"set it, or give one number"
        )
    if elastic:
        batch = global_batch(config, high)
        worlds = fitting(config, range(low, high + 1), batch)
        if not worlds:
            others = ", ".join(map(str, fitting(config, range(1, 4 * high + 65), batch)[:12]))
            raise ConfigError(
                f"--num-workers {low}:{high}: no layout of so many ranks keeps the global batch of {batch} sequences; "
                f"numbers of ranks that do: {others or 'none'}"
            )
        if (worlds[0], worlds[-1]) != (low, high):
            notes.append(f"{worlds[0]} to {worlds[-1]} workers, not {low} to {high}: no layout fits the others")
    else:
        config = for_world(config, high, notes.append, elsewhere=True)
        worlds = [high]
    saves = config.checkpoint.save_steps > 0
    failures = request.max_failures if request.max_failures is not None else config.launch.max_restarts
    if not saves and failures:
        failures = 0
        notes.append("checkpoint.save_steps=0: a lost worker ends the run, for there is nothing to go on from")
    return (
        Plan(
            config=config,
            address=address,
            worlds=tuple(worlds),
            elastic=len(worlds) > 1,
            batch=batch,
            resources=_resources(config, request),
            max_failures=failures,
            environment={
                name: environ[name]
                for name in sorted(environ)
                if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIX)
            },
            token=secrets.token_hex(4),
        ),
        notes,
    )


def _range(text: str | None, config: Config) -> tuple[int, int]:
    if text is None:
        return config.launch.nproc_per_node, config.launch.nproc_per_node
    low, colon, high = text.partition(":")
    if not low.isdecimal() or (colon and not high.isdecimal()) or not 1 <= int(low) <= int(high or low):
        raise ConfigError(f"--num-workers {text}: allowed: a number as in 4, or a range as in 2:8")
    return int(low), int(high or low)


def _resources(config: Config, request: Request) -> dict[str, float]:
    gpus, device = request.gpus_per_worker, config.launch.device
    if gpus is None:
        gpus = 1 if device == "cuda" else 0
    if (gpus and device == "cpu") or (not gpus and device == "cuda"):
        raise ConfigError(f"--gpus-per-worker {gpus}, but launch.device={device}: leave one of them out")
    if request.cpus_per_worker <= 0:
        raise ConfigError(f"--cpus-per-worker {request.cpus_per_worker:g}: more than 0")
    cpus = request.cpus_per_worker
    return {"CPU": int(cpus) if cpus == int(cpus) else cpus} | ({"GPU": gpus} if gpus else {})


def _worlds_text(plan: Plan) -> str:
    text = ", ".join(map(str, plan.worlds))
    missing = sorted(set(range(plan.worlds[0], plan.worlds[-1])) - set(plan.worlds))
    if missing:
        text += f"; of {', '.join(map(str, missing))} workers some wait: no layout fits so many ranks"
    return text


def _assignments(values: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())
