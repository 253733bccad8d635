"""Not enough memory: was it that, and what to change. Imports no torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_LESS = (
    "less of it, in this order: train.per_device_train_batch_size, train.gradient_checkpointing, parallel.zero_stage, "
    "parallel.ep_size, data.max_seq_length, parallel.cpu_offload"
)
"""The keys to change, those first that cost the least; docs/running.md has a table."""
_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed")
"""In the words of CUDA, of PyTorch on CPU, of the system, and of cuBLAS."""
VMSTAT = Path("/proc/vmstat")


def advice(error: BaseException) -> str:
    """What to add to the error's own words; "" when memory was not what it lacked."""
    lacks = isinstance(error, MemoryError) or any(words in str(error).lower() for words in _WORDS)
    return f"; memory: {_LESS}" if lacks else ""


def is_of_memory(line: str) -> bool:
    """Whether what is said of an end has this advice in it."""
    return _LESS in line


class OomKills:
    """What the OOM killer of this machine's kernel has ended since this was made: when ranks were started."""

    def __init__(self) -> None:
        self._before = _count()

    def why_killed(self) -> str:
        """What to say of a process that was ended by SIGKILL since then."""
        if _count() > self._before:
            return f", probably by the kernel's OOM killer ({_LESS})"
        return ", by a person or by the kernel's OOM killer"


def _count() -> int:
    """Processes that it has ended since the machine was started; 0 where that is not counted (Linux does)."""
    with suppress(OSError, ValueError):
        for line in VMSTAT.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
