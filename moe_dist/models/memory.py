"""Large tensors on a CPU without a page fault per 4 KB."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

from torch import Tensor

_ENOUGH = 4 << 20
"""Bytes from which large pages (2 MB on x86) are worth asking for."""
_PAGE = 4096
_MADV_HUGEPAGE = 14

_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def new_empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """`like.new_empty(shape)`. On Linux CPUs big ones ask the kernel for large pages.

    Memory fresh from the system is mapped and zeroed page by page at first touch; for the temporaries and
    gradients of experts this took up to a third of a step. A hint: where it is refused, nothing changes.
    """
    tensor = like.new_empty(shape)
    if _madvise is not None and tensor.device.type == "cpu" and tensor.nbytes >= _ENOUGH:
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        length = (tensor.data_ptr() + tensor.nbytes - start) // _PAGE * _PAGE
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor
