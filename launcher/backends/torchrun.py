"""`moe-dist launch torchrun`: torchrun's command line for a run, with the defaults that it needs. Imports no torch."""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launcher.backends.command import TRAIN, Start, check_world, chosen, for_world
from launcher.connect.addresses import interface_of, outward
from launcher.connect.environment import BATCH, given_batch
from launcher.supervise.processes import LOOPBACK, rank_environment
from moe_dist.config import Config, ConfigError
from moe_dist.plan.elastic import first_batch

# A lost machine is noticed within 3 s instead of 15, and those that are left wait 3 s for others instead of 30.
_QUICK = {"keep_alive_interval": "1", "keep_alive_max_attempt": "3", "heartbeat": "1", "last_call_timeout": "3"}


@dataclass(frozen=True)
class Request:
    """What a person asks torchrun for. None: what fits."""

    nnodes: str = "1"
    nproc_per_node: int | None = None
    node_rank: int | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str | None = None
    rdzv_conf: str | None = None
    local_addr: str | None = None
    max_restarts: int | None = None
    options: tuple[str, ...] = ()
    """More words for torchrun, as they are."""


def plan(
    path: str,
    overrides: Sequence[str],
    config: Config,
    request: Request,
    notice: Callable[[str], None] = lambda text: None,
) -> Start:
    """The agent of this machine. Raises ConfigError when it could not work."""
    few, many = machines(request.nnodes)
    ranks = request.nproc_per_node or config.launch.nproc_per_node
    _check(config, request, few, many)
    batch = _global_batch(config, few, many, ranks)
    if few == many:
        config = for_world(config, many * ranks, notice, per_host=ranks)
        overrides = [*overrides, *chosen(config)]
    if many == 1:
        endpoint = request.rdzv_endpoint or f"{LOOPBACK}:0"
        name = request.rdzv_id or secrets.token_hex(8)
    else:
        endpoint = _with_port(request.rdzv_endpoint)
        # The same on every machine, and another one for another run: nobody joins the wrong one.
        folder = hashlib.sha256(str(config.train.output_dir).encode()).hexdigest()
        name = request.rdzv_id or f"moe-dist-{folder[:8]}"
    address = request.local_addr or (address_towards(endpoint) if request.rdzv_endpoint else LOOPBACK)
    restarts = request.max_restarts
    if restarts is None:
        restarts = config.launch.max_restarts if config.checkpoint.save_steps else 0
    conf = {**_QUICK, **_pairs(request.rdzv_conf)}
    if request.node_rank is not None and many > 1:
        # torchrun finds out by itself whether it is the host, but not where names and addresses do not match.
        conf.setdefault("is_host", "1" if request.node_rank == 0 else "0")
    command = [
        *(sys.executable, "-m", "moe_dist", "agent"),
        f"--nnodes={request.nnodes}",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={name}",
        f"--rdzv-conf={','.join(f'{key}={value}' for key, value in conf.items())}",
        f"--local-addr={address}",
        f"--shutdown-timeout={math.ceil(config.launch.grace_period)}",
        *request.options,
        *(*TRAIN, path, *overrides),
    ]
    variables = defaults(config, ranks, address)
    if few < many and BATCH not in os.environ:
        variables[BATCH] = str(batch)
    return Start(variables, tuple(command))


def machines(nnodes: str) -> tuple[int, int]:
    """`2` is (2, 2), `1:4` is (1, 4)."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", nnodes)
    few, many = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= few <= many:
        raise ConfigError(f"--nnodes {nnodes}: allowed: a number of machines, or the fewest and the most, as in 1:4")
    return few, many


def defaults(config: Config, ranks: int, address: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that the ranks should have and nobody has set."""
    mine = config.model_copy(deep=True)
    mine.launch.nproc_per_node = ranks
    wanted = rank_environment(mine)
    interface = interface_of(address)
    if interface is not None:
        wanted["GLOO_SOCKET_IFNAME"] = interface
        if config.launch.device != "cpu":
            wanted["NCCL_SOCKET_IFNAME"] = interface
    if config.launch.device != "cpu":
        wanted["NCCL_DEBUG"] = "WARN"
    # Without it, ranks that start again may hang in the store of the start before.
    wanted["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return {name: value for name, value in wanted.items() if name not in environ}


def address_towards(endpoint: str) -> str:
    """The address of this machine that others see, on the way to where all of them meet."""
    host = _host(endpoint)
    for target in (host, ""):
        found = outward(target)
        # A machine's own name may lead to its loopback, on which no other can reach it.
        if found and (not found.startswith("127.") or host == "localhost" or host.startswith("127.")):
            return found
    return socket.gethostname()


def _check(config: Config, request: Request, few: int, many: int) -> None:
    elastic = few < many
    if many > 1 and not request.rdzv_endpoint:
        raise ConfigError(
            f"--nnodes {request.nnodes}: say where the machines meet: --rdzv-endpoint HOST:PORT, the same on each"
        )
    # With MIN:MAX there may be spare machines.
    if request.node_rank is not None and request.node_rank >= many and not elastic:
        raise ConfigError(f"--node-rank {request.node_rank}: from 0 to {many - 1} (--nnodes {request.nnodes})")
    if elastic and not config.parallel.elastic:
        raise ConfigError(
            f"--nnodes {request.nnodes}: the number of ranks may change; allowed with parallel.elastic=true"
        )
    if elastic and config.checkpoint.resume != "auto":
        raise ConfigError(
            f"checkpoint.resume={config.checkpoint.resume}: with --nnodes {request.nnodes} every change of machines is "
            "a new start, which must go on from the newest checkpoint; take auto, and for a new run a new "
            "train.output_dir"
        )


def _global_batch(config: Config, few: int, many: int, ranks: int) -> int:
    """Sequences in a step with all machines there, which fewer must be able to keep. Raises ConfigError if not."""
    batch = given_batch() or first_batch(config, many * ranks)
    for nodes in range(few, many + 1):
        try:
            check_world(config, nodes * ranks, batch)
        except ConfigError as error:
            raise ConfigError(f"{nodes} nodes x {ranks} ranks: {error}") from None
    return batch


def _with_port(endpoint: str | None) -> str:
    host, colon, port = (endpoint or "").rpartition(":")
    if not colon:
        return f"{port}:29400"
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--rdzv-endpoint {endpoint}: HOST:PORT, the same on every machine")
    return endpoint or ""


def _host(endpoint: str) -> str:
    return endpoint.rpartition(":")[0] or endpoint


def _pairs(text: str | None) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in (text or "").split(",") if pair]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise ConfigError(f"--rdzv-conf {text}: NAME=VALUE,NAME=VALUE")
    return {name: value for name, _, value in pairs}
