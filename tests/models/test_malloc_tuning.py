"""What a process keeps of what it has freed."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from moe_dist.models.malloc_tuning import GIVEN_BACK

SCRIPT = """
import ctypes, json, sys
from moe_dist.models.malloc_tuning import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])
assert keep_freed_memory()
left = []
for size in map(int, sys.argv[1:]):
    before = resident()
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    assert resident() - before > size / 2
    libc.free(block)
    left.append((resident() - before) / size)
print(json.dumps(left))
"""


@pytest.mark.skipif(
    tuple(map(int, (platform.libc_ver()[1] or "0").split("."))) < (2, 35) or platform.libc_ver()[0] != "glibc",
    reason="needs glibc 2.35 or newer",
)
def test_giants_go_back_and_all_else_stays() -> None:
    """Planted: everything kept (M_MMAP_MAX of 0 alone), and nothing (no call)."""
    sizes = map(str, (GIVEN_BACK * 9 // 8, GIVEN_BACK // 4))
    done = subprocess.run([sys.executable, "-c", SCRIPT, *sizes], capture_output=True, text=True, check=True)
    giant, large = json.loads(done.stdout)
    assert giant < 0.05
    assert large > 0.95
