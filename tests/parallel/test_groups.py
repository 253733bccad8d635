"""Process groups of meshes that follow each other in the same processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Mesh

pytestmark = pytest.mark.dist


def groups() -> None:
    layouts = [Layout(4, pp_size=2, ep_size=2), Layout(4, ep_size=2), Layout(4, ep_size=4)]
    first = [Mesh.create(layout, torch.device("cpu")) for layout in layouts]
    known = len(dist.distributed_c10d._world.pg_map)
    again = [Mesh.create(layout, torch.device("cpu")) for layout in layouts]
    assert len(dist.distributed_c10d._world.pg_map) == known
    for mesh, other in zip(first, again, strict=True):
        for axis in ("pp", "dp", "edp", "ep"):
            group = mesh.group(axis)
            assert group is other.group(axis)
            if group is not None:
                ranks = next(ranks for ranks in mesh.layout.groups(axis) if mesh.rank in ranks)
                assert dist.get_process_group_ranks(group) == ranks
                assert group is dist.group.WORLD or group.group_desc == f"mesh_{axis}"
    pipelined = first[0]  # dp and ep have the same ranks there, and yet
    assert pipelined.group("dp") is not pipelined.group("ep")
    assert first[2].group("ep") is dist.group.WORLD


def test_they_are_made_once_and_no_two_axes_share_one() -> None:
    """But for the one of all ranks. Names are what a hang is told by."""
    run_ranks(groups, 4)
