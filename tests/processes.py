"""Which processes are ranks, as the kernel tells of them."""

from __future__ import annotations

import re
from pathlib import Path


def rank_of(pid: int) -> int | None:
    """The rank this process was told, in its environment or, where it was forked, by its name; None for others.

    Raises OSError when it has gone.
    """
    forked = re.fullmatch(r"moe-rank-(\d+)\n", Path(f"/proc/{pid}/comm").read_text())
    told = forked or re.search(r"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes().decode("latin-1"))
    return int(told[1]) if told else None
