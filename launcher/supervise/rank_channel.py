"""What ranks tell whoever has started them: a pipe for words, shared memory for where they are. Imports no torch."""

from __future__ import annotations

import json
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from launcher.connect.rank_job import REPORTS, STATUS
from launcher.supervise.hang import RankState
from moe_dist.parallel.status import SLOT, Position, Status, read, read_sign

if TYPE_CHECKING:
    from moe_dist.parallel.mesh import Mesh

_INTERVAL = 0.5
"""Seconds between two signs of life."""
_STALE = 2.0
"""Seconds without any, after which it is worth a look why."""


@contextmanager
def telling(status: Status, mesh: Mesh) -> Iterator[None]:
    """In a rank: a thread that tells the board which collective this one is in, and how many it has called."""
    from launcher.supervise.collective_trace import Calls  # torch, which the other end of the board does not need

    over, calls = threading.Event(), Calls(mesh.group("pp"))

    def tell() -> None:
        while not over.wait(_INTERVAL):
            status.tell(calls.sign)

    thread = threading.Thread(target=tell, name="telling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_STALE)


class RankChannel:
    """Where the ranks of one machine report; nothing of it is left when the last process that has it ends."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._reports, self.theirs = os.pipe()
        os.set_blocking(self._reports, False)
        self.status, path = tempfile.mkstemp()
        os.unlink(path)  # shared by its number
        os.ftruncate(self.status, count * SLOT)
        self._slots = mmap.mmap(self.status, count * SLOT)
        self._messages: dict[int, str] = {}
        self._heard: set[int] = set()
        self._unread = b""

    def for_children(self) -> dict[str, str]:
        """Variables for ranks that inherit `theirs` and `status`."""
        return {REPORTS: str(self.theirs), STATUS: str(self.status)}

    def for_strangers(self) -> dict[str, str]:
        """Variables for ranks that somebody else starts in this process, and that inherit nothing (Linux)."""
        if not sys.platform.startswith("linux"):
            return {}
        return {name: f"/proc/{os.getpid()}/fd/{number}" for name, number in self.for_children().items()}

    @property
    def messages(self) -> dict[int, str]:
        """What went wrong in each rank in its own words, the first to speak first."""
        with suppress(BlockingIOError):
            while data := os.read(self._reports, 65536):
                self._unread += data
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            rank, text = json.loads(line)
            if text is None:
                self._heard.add(rank)
            else:
                self._messages.setdefault(rank, text)
        return self._messages

    @property
    def heard(self) -> set[int]:
        """Ranks that know that they are asked to stop."""
        return self._heard if self.messages is not None else set()

    @property
    def positions(self) -> dict[int, Position]:
        """Where each rank of this machine was when it last moved; those that have said nothing yet are missing."""
        found = {rank: read(self._slots, rank) for rank in range(self.count)}
        return {rank: position for rank, position in found.items() if position is not None}

    def seen(self, rank: int, is_stopped: Callable[[int], bool]) -> RankState | None:
        """All that is known of a rank; None when it has said nothing yet."""
        position, sign = read(self._slots, rank), read_sign(self._slots, rank)
        if position is None:
            return None
        age, calls = sign or (position.seconds, {})
        if age > _STALE and is_stopped(rank):
            return RankState(position, 0.0, "stopped", **calls)
        if age > max(_STALE, position.seconds / 2):  # something holds Python's lock: in a collective it would not
            calls |= {"inside": None, "waited": 0.0}
        return RankState(position, **calls)

    def clear(self) -> None:
        """Other ranks will use it."""
        self.messages.clear()
        self._heard.clear()
        self._slots[:] = bytes(len(self._slots))

    def close(self) -> None:
        os.close(self._reports)
        self._slots.close()
        os.close(self.status)
