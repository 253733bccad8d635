"""Freed memory of a CPU process stays with the process."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell the C library to reuse what large tensors free instead of returning it to the system; whether it took.

    Otherwise every large temporary and gradient is mapped and zeroed anew, page by page, which takes up to a third
    of a step of experts on a CPU. The price: the process stays as large as its peak. For the whole process, so it is
    for the start of a worker to call, not for a layer. glibc only; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
