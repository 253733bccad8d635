"""How the agents of several machines meet: torchrun's own rules, over a store that only they can reach, in JSON.

torch's c10d rendezvous keeps its state pickled in a store that listens on all interfaces: whoever reaches the port runs
code in every agent. Here one machine needs no port at all. On several the host's store listens on loopback, the others
come through a gate (`launcher.connect.gate`), and the state is JSON.
"""

from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime, timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    dynamic_rendezvous,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from launcher.connect.environment import TOKEN
from launcher.connect.gate import Gate, Tunnel, is_here, served_at
from launcher.connect.handshake import listen
from launcher.connect.process_groups import loopback_store
from launcher.connect.secret import job_secret
from moe_dist.config import ConfigError

DYNAMIC, STATIC = "c10d", "static"
"""torchrun's names, of the rendezvous that stand here in the place of its own."""
_OURS = "moe-dist-"
_PORT = 29400


def install(options: Any) -> None:
    """torchrun's options, with our rendezvous for its c10d and static; the ranks get the run's name as their token."""
    few_many = str(options.nnodes).split(":")
    alone = options.standalone or few_many[-1] == "1"
    if options.rdzv_backend not in (DYNAMIC, STATIC):
        raise ConfigError(f"--rdzv-backend {options.rdzv_backend}: allowed: {DYNAMIC}, {STATIC}")
    if options.rdzv_backend == STATIC and not options.rdzv_endpoint:
        options.rdzv_endpoint = f"{options.master_addr}:{options.master_port or 29500}"
    if alone:
        options.standalone, options.rdzv_backend = False, DYNAMIC
        options.local_addr = options.local_addr or "127.0.0.1"
    os.environ[TOKEN] = options.rdzv_id
    dynamic_rendezvous.pickle = _Json  # type: ignore[assignment]
    registered = {DYNAMIC: _dynamic, STATIC: _static}
    name = f"{_OURS}{options.rdzv_backend}"
    rendezvous_handler_registry.register(name, registered[options.rdzv_backend])
    options.rdzv_backend = name
    if name == _OURS + STATIC:
        options.rdzv_conf = ",".join(filter(None, (options.rdzv_conf, f"rank={options.node_rank}")))


class _Json:
    """What torch's state of a rendezvous is written with, in the place of `pickle`."""

    PickleError = ValueError

    @staticmethod
    def dumps(state: Any) -> bytes:
        def node(one: Any) -> list[Any]:
            return [one.addr, one.pid, one.local_id]

        tree = {
            "round": state.round,
            "complete": state.complete,
            "deadline": state.deadline and state.deadline.isoformat(),
            "closed": state.closed,
            "participants": [[node(one), rank] for one, rank in state.participants.items()],
            "wait_list": [node(one) for one in state.wait_list],
            "redundancy_list": [node(one) for one in state.redundancy_list],
            "last_heartbeats": [[node(one), moment.isoformat()] for one, moment in state.last_heartbeats.items()],
        }
        return json.dumps(tree).encode()

    @staticmethod
    def loads(text: bytes) -> Any:
        def node(one: Any) -> Any:
            addr, pid, local_id = one
            return dynamic_rendezvous._NodeDesc(str(addr), int(pid), int(local_id))

        def moment(text: str) -> datetime:
            found = datetime.fromisoformat(text)
            return found if found.tzinfo else found.replace(tzinfo=UTC)

        try:
            tree = json.loads(text)
            state = dynamic_rendezvous._RendezvousState()
            state.round, state.complete, state.closed = int(tree["round"]), bool(tree["complete"]), bool(tree["closed"])
            state.deadline = tree["deadline"] and moment(tree["deadline"])
            state.participants = {node(one): int(rank) for one, rank in tree["participants"]}
            state.wait_list = {node(one) for one in tree["wait_list"]}
            state.redundancy_list = {node(one) for one in tree["redundancy_list"]}
            state.last_heartbeats = {node(one): moment(when) for one, when in tree["last_heartbeats"]}
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no state of a rendezvous: {error}") from None
        return state


def _dynamic(params: RendezvousParameters) -> RendezvousHandler:
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # ranks meet at a store of rank 0's
    store = dist.HashStore() if params.max_nodes == 1 else _store(params, params.get_as_bool("is_host"))
    return create_handler(store, _Backend(store, params.run_id), params)


class _Backend(C10dRendezvousBackend):
    @property
    def name(self) -> str:
        return f"{_OURS}{DYNAMIC}"


def _static(params: RendezvousParameters) -> RendezvousHandler:
    host, port = parse_rendezvous_endpoint(params.endpoint.strip(), _PORT)
    rank = params.get_as_int("rank", 0) or 0
    timeout = params.get_as_int("timeout", 600) or 600
    return _Static(_store(params, rank == 0, timeout), host, port, rank, params.max_nodes, params.run_id, timeout)


class _Static(StaticTCPRendezvous):
    """Machines with fixed numbers; their ranks meet at the agents' store."""

    def __init__(self, store: dist.Store, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._store = store

    def get_backend(self) -> str:
        return f"{_OURS}{STATIC}"

    def next_rendezvous(self) -> RendezvousInfo:
        assert self._store is not None
        store = dist.PrefixStore(self.run_id, self._store)
        store_info = RendezvousStoreInfo(self.master_addr, self.master_port)
        return RendezvousInfo(store, self.rank, self.world_size, store_info)


def _store(params: RendezvousParameters, is_host: bool | None, wait: float | None = None) -> dist.Store:
    """The agents' store at the endpoint: served here, or reached there. Raises ConfigError or RendezvousError."""
    host, port = parse_rendezvous_endpoint(params.endpoint, _PORT)
    timeout = timedelta(seconds=params.get_as_int("read_timeout", 60) or 60)
    purpose, secret = f"store {params.run_id}", job_secret()
    if is_host or (is_host is None and is_here(host)):
        try:
            gate = listen(served_at(host), port)
        except OSError as error:
            if is_host or error.errno != errno.EADDRINUSE:
                raise RendezvousConnectionError(str(error.strerror)) from error
        else:  # otherwise another agent of this machine serves there
            inner = listen("127.0.0.1")
            store = loopback_store(inner.getsockname()[1], inner, timeout)
            Gate(gate, secret, purpose, store.port)
            return store
    tunnel = Tunnel(host, port, secret, purpose, wait or timeout.total_seconds())
    return loopback_store(tunnel.port, None, timeout)
