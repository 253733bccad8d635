"""Which collective a rank is in, and how many it has called: read from outside the thread that trains.

Only reads what PyTorch counts anyway: a step costs nothing more, and no device is touched.
"""

from __future__ import annotations

import sys
from contextlib import suppress

import torch.distributed as dist
from torch.distributed import distributed_c10d


def counted(leave_out: str = "") -> dict[str, int]:
    """Group, as `name@first rank#its own name`, -> number of its last collective. `leave_out`: the own name of a group,
    as the one of a pipeline, whose ranks do not all call the same."""
    found = {}
    with suppress(AttributeError, RuntimeError):  # private, or just being destroyed
        for group in list(distributed_c10d._world.pg_map):
            if group.group_name == leave_out or group.size() == 1:
                continue
            name = "world" if group is dist.group.WORLD else group.group_desc.removeprefix("mesh_")
            number = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
            if number:
                found[f"{name}@{dist.get_process_group_ranks(group)[0]}#{group.group_name}"] = number
    return found


def inside(thread: int) -> str | None:
    """The function of torch.distributed in which a thread is, None when it is somewhere else."""
    frame = sys._current_frames().get(thread)
    found = None
    # From the innermost frame on: a pipeline's schedule has everything else inside it.
    while frame is not None and "/torch/distributed/" in frame.f_code.co_filename:
        if found is None or frame.f_code.co_filename == distributed_c10d.__file__:
            found = frame.f_code.co_name
        frame = frame.f_back
    return found
