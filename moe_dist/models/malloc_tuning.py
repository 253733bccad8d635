"""Freed memory of a CPU process stays with the process."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
GIVEN_BACK = 256 * 2**20
"""Bytes from which on a tensor's memory goes back to the system. What is freed in between may not fit what is needed
next: a process whose logits took gigabytes grew by half as much again."""


def keep_freed_memory() -> bool:
    """Tell the C library to reuse what large tensors free instead of returning it to the system; whether it took.

    Otherwise every large temporary and gradient is mapped and zeroed anew, page by page, which takes up to a third
    of a step of experts on a CPU. The price: the process stays as large as its peak, but for tensors of GIVEN_BACK. For
    the whole process, so it is for the start of a worker to call, not for a layer. glibc only; elsewhere nothing
    happens, and one before 2.35, which knows no such threshold, keeps everything.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    kept = mallopt(_M_MMAP_THRESHOLD, GIVEN_BACK) or mallopt(_M_MMAP_MAX, 0)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
