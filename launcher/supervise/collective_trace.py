"""Which collective a rank is in, and how many it has called: read from outside the thread that trains.

Only reads what PyTorch counts anyway: a step costs nothing more, and no device is touched.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from moe_dist.parallel.flight import Flight


class Calls:
    """What the thread that makes this has to do with collectives. `leave_out`: a group, as the one of a pipeline, whose
    ranks do not all call the same."""

    def __init__(self, leave_out: dist.ProcessGroup | None) -> None:
        self._thread, self._leave_out = threading.get_ident(), leave_out
        self._last: tuple[str | None, dict[str, int]] = None, {}
        self._since = 0.0

    @property
    def sign(self) -> dict[str, Any]:
        """Fields of a `RankState`, for another thread that looks now and then: `inside`, `calls`, and `waited`, the
        seconds for which both have been seen the same."""
        now, found = time.monotonic(), (inside(self._thread), counted(self._leave_out))
        if found != self._last:
            self._last, self._since = found, now
        return {"inside": found[0], "calls": found[1], "waited": now - self._since if found[0] else 0.0}


def counted(leave_out: dist.ProcessGroup | None = None) -> dict[str, int]:
    """Group, as `name@first rank#its own name`, -> number of its last collective."""
    found = {}
    left_out = None if leave_out is None else leave_out.group_name
    with suppress(AttributeError, RuntimeError):  # private, or just being destroyed
        for group in list(distributed_c10d._world.pg_map):
            if group.group_name == left_out or group.size() == 1:
                continue
            name = "world" if group is dist.group.WORLD else group.group_desc.removeprefix("mesh_")
            number = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
            if number:
                found[f"{name}@{dist.get_process_group_ranks(group)[0]}#{group.group_name}"] = number
    return found


def inside(thread: int) -> str | None:
    """The function of torch.distributed in which a thread is, `wait` for our messages, None when it is elsewhere."""
    frame = sys._current_frames().get(thread)
    found = None
    # It waits for messages there, in no function of theirs.
    if frame is not None and frame.f_code is Flight.land.__code__:
        return "wait"
    # From the innermost frame on: a pipeline's schedule has everything else inside it.
    while frame is not None and "/torch/distributed/" in frame.f_code.co_filename:
        if found is None or frame.f_code.co_filename == distributed_c10d.__file__:
            found = frame.f_code.co_name
        frame = frame.f_back
    return found
