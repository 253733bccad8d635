"""The ranks as a mesh, and the process groups cut out of it.

world = pp x edp x ep, with ep fastest: neighbours share a layer's experts. Dense parameters are replicated over
dp = edp x ep, experts over edp; tokens differ between all ranks of dp.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from moe_dist.parallel.exchange import as_error, as_failure, broadcast, gather
from moe_dist.parallel.layout import Layout

Answer = TypeVar("Answer")

_groups: dict[tuple[ProcessGroup, str, tuple[tuple[int, ...], ...]], ProcessGroup] = {}
"""By the default process group they are cut out of, axis and ranks: they serve the next mesh of the process too."""
# A program may end with them open: let go while Python still runs, when their threads can still be ended.
atexit.register(_groups.clear)


class Hosts(NamedTuple):
    """Of an expert group that is on several hosts: `across`, its ranks with this one's local rank on each of them, and
    `within`, its ranks on this one."""

    across: ProcessGroup
    within: ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """This rank's coordinates and its groups. A group of one rank is None: nothing to communicate.

    `sparse` is the DeviceMesh (pp, edp, ep), `dense` the same ranks as (pp, dp); both None in a single process. With
    hybrid sharding `hybrid_dense` is (pp, dp_replicate, dp_shard), `hybrid_sparse` (pp, edp_replicate, edp_shard, ep).
    """

    layout: Layout
    rank: int
    device: torch.device
    sparse: DeviceMesh | None = None
    dense: DeviceMesh | None = None
    hybrid_dense: DeviceMesh | None = None
    hybrid_sparse: DeviceMesh | None = None
    hosts: Hosts | None = None
    """Of this rank's expert group, where the dispatcher asks for them."""
    _groups: dict[str, ProcessGroup | None] = field(default_factory=dict, repr=False, compare=False)
    """By axis, once asked for: to cut one out of a DeviceMesh takes milliseconds."""

    @staticmethod
    def single(device: torch.device | str = "cpu") -> Mesh:
        """One process, no communication: the reference every layout is held against."""
        return Mesh(Layout(world_size=1, pp_size=1, ep_size=1), 0, torch.device(device))

    @staticmethod
    def create(
        layout: Layout, device: torch.device, shard_size: int | None = None, ranks_on_a_host: int | None = None
    ) -> Mesh:
        """Cut the groups of `layout` out of the default process group (a collective call).

        `shard_size`: replicas over which parameters are sharded, when it is not all of them. `ranks_on_a_host`: of an
        expert group that is on several hosts, when they are to have groups.
        """
        if not dist.is_initialized():
            if layout.world_size == 1:
                return Mesh(layout, 0, device)
            raise ValueError(f"world size {layout.world_size}: no process group has been started")
        if dist.get_world_size() != layout.world_size:
            raise ValueError(f"layout of {layout.world_size} ranks, but {dist.get_world_size()} were started")
        sparse = _device_mesh(device, pp=layout.pp_size, edp=layout.edp_size, ep=layout.ep_size)
        dense = _device_mesh(device, pp=layout.pp_size, dp=layout.dp_size)
        hosts = _groups_of_hosts(layout, ranks_on_a_host)
        if shard_size is None or shard_size == layout.dp_size:
            return Mesh(layout, dist.get_rank(), device, sparse, dense, hosts=hosts)
        if layout.dp_size % shard_size:
            raise ValueError(f"parallel.shard_size={shard_size}: must divide the {layout.dp_size} replicas (dp)")
        expert_size = max(1, shard_size // layout.ep_size)
        hybrid_dense = _device_mesh(
            device, pp=layout.pp_size, dp_replicate=layout.dp_size // shard_size, dp_shard=shard_size
        )
        hybrid_sparse = _device_mesh(
            device,
            pp=layout.pp_size,
            edp_replicate=layout.edp_size // expert_size,
            edp_shard=expert_size,
            ep=layout.ep_size,
        )
        return Mesh(layout, dist.get_rank(), device, sparse, dense, hybrid_dense, hybrid_sparse, hosts)

    @cached_property
    def ep_mesh(self) -> DeviceMesh:
        """The ranks over which this rank's experts are spread."""
        assert self.sparse is not None
        return self.sparse["ep"]

    @cached_property
    def experts_first(self) -> DeviceMesh:
        """The ranks of one pipeline stage in the order in which stacks of experts are cut: (ep, edp), or with hybrid
        sharding (ep, edp_replicate, edp_shard). Made of the groups that are there, without communication.
        """
        assert self.sparse is not None
        if self.hybrid_sparse is None:
            mesh, axes = self.sparse["edp", "ep"], ["edp"]
        else:
            mesh, axes = self.hybrid_sparse["edp_replicate", "edp_shard", "ep"], ["edp_replicate", "edp_shard"]
        names = ("ep", *axes)
        groups = [mesh.get_group(axis) for axis in names]
        ranks = mesh.mesh.movedim(-1, 0).contiguous()
        return DeviceMesh.from_group(groups, mesh.device_type, mesh=ranks, mesh_dim_names=names)

    def group(self, axis: str) -> ProcessGroup | None:
        """The process group of this rank along `pp`, `dp`, `edp`, `ep`, `dp_shard` or `edp_shard`, or the `world`.

        None when it has one member.
        """
        if axis not in self._groups:
            self._groups[axis] = self._group(axis)
        return self._groups[axis]

    def _group(self, axis: str) -> ProcessGroup | None:
        if axis == "world":
            return dist.group.WORLD if self.sparse is not None and self.layout.world_size > 1 else None
        if axis.endswith("_shard"):
            hybrid = self.hybrid_dense if axis == "dp_shard" else self.hybrid_sparse
            if hybrid is None:
                return self.group(axis.removesuffix("_shard"))
            return None if hybrid[axis].size() == 1 else hybrid.get_group(axis)
        mesh = self.dense if axis == "dp" else self.sparse
        if mesh is None or mesh[axis].size() == 1:
            return None
        return mesh.get_group(axis)

    @property
    def pp_rank(self) -> int:
        return self.layout.coordinates(self.rank)[0]

    @property
    def ep_rank(self) -> int:
        return self.layout.coordinates(self.rank)[2]

    @property
    def dp_rank(self) -> int:
        return self.layout.dp_index(self.rank)

    def sum_over(self, axis: str, tensor: Tensor) -> Tensor:
        """SUM of `tensor` over an axis, in place; tensor itself when the axis has one rank."""
        group = self.group(axis)
        if group is not None:
            dist.all_reduce(tensor, group=group)
        return tensor

    def from_rank_zero(self, tensor: Tensor) -> Tensor:
        """`tensor` as rank 0 of the world has it, in place."""
        if dist.is_initialized():
            dist.broadcast(tensor, src=0)
        return tensor

    def ask_rank_zero(self, ask: Callable[[], Answer]) -> Answer:
        """What `ask` gives on rank 0, on every rank; a ValueError or OSError it raises there is raised everywhere."""
        if self.group("world") is None:
            return ask()
        answer, failure, error = None, None, None
        if self.rank == 0:
            try:
                answer = ask()
            except (ValueError, OSError) as raised:
                error, failure = raised, as_failure(raised)
        reply = broadcast((answer, failure), self.device)
        if reply[1] is not None:
            raise error or as_error(reply[1])
        return cast(Answer, reply[0])

    def from_all(self, value: Answer, axis: str = "world") -> list[Answer]:
        """What every rank of an axis has, in their order, on each of them; for a few small things, now and then.

        Lists, tuples, sets, dicts, text, numbers, paths, tensors, and dataclasses and named tuples of this package.
        """
        group = self.group(axis)
        return [value] if group is None else gather(value, group, self.device)

    def barrier(self) -> None:
        """Wait for every rank."""
        if dist.is_initialized():
            dist.barrier()


def _groups_of_hosts(layout: Layout, ranks_on_a_host: int | None) -> Hosts | None:
    """Of this rank's expert group (a collective call)."""
    if ranks_on_a_host is None:
        return None
    members = [torch.tensor(group).view(-1, ranks_on_a_host) for group in layout.groups("ep")]
    across = _group("across_hosts", [column for group in members for column in group.t().tolist()])
    within = _group("within_host", [row for group in members for row in group.tolist()])
    return Hosts(across, within)


def _device_mesh(device: torch.device, **sizes: int) -> DeviceMesh:
    """All ranks as a mesh of these axes, the last of them fastest (a collective call)."""
    ranks = torch.arange(dist.get_world_size()).view(*sizes.values())
    groups = [
        _group(axis, ranks.movedim(number, -1).reshape(-1, size).tolist())
        for number, (axis, size) in enumerate(sizes.items())
    ]
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=tuple(sizes))


def _group(axis: str, members: list[list[int]]) -> ProcessGroup:
    """This rank's of the groups `members` (a collective call).

    The one of all ranks is the default group, for every axis. Else two axes never share one, even of the same ranks:
    what is under way on one must not meet what is on the other. Ranks that are alone send nothing: any axis may have
    theirs.
    """
    world = dist.group.WORLD
    assert world is not None
    if len(members) == 1:
        return world
    if any(known is not world for known, *_ in _groups):
        _groups.clear()
    key = (world, "" if len(members[0]) == 1 else axis, tuple(map(tuple, members)))
    if key not in _groups:
        made = [dist.new_group(ranks, group_desc=f"mesh_{axis}") for ranks in members]
        _groups[key] = next(group for group, ranks in zip(made, members, strict=True) if dist.get_rank() in ranks)
    return _groups[key]
