"""Ranks tell each other where they are, over connections that training does not share. Imports no torch.

A star: rank 0 listens, the others connect, each sends a line of JSON now and then. Nothing here ever blocks for long,
so that a link that is cut, a stopped process or a stranger holds nobody up.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from contextlib import suppress
from typing import Any, NamedTuple

from launcher.connect import handshake
from launcher.connect.addresses import addresses

Message = dict[str, Any]
_LONGEST = 65536
"""Bytes of a line, and of what is read from a connection at a time."""
_PURPOSE = "watchdog"
CUT = 8.0
"""Seconds for which nothing that was sent has arrived, after which a link counts as cut."""
_AGAIN = 3
"""Times in a row that something has been sent again and not arrived."""


class Offer(NamedTuple):
    """Where rank 0 listens, and the secret that keeps strangers out."""

    addresses: list[str]
    port: int
    secret: str


class Line:
    """One connection: messages out and in, without waiting."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket, self.opened, self.closed = connection, time.monotonic(), False
        self._unsent, self._unread = b"", b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Message, must: bool = True) -> None:
        """`must`: even when the other end has not taken the last ones yet."""
        if must or not self._unsent:
            self._unsent += json.dumps(message).encode() + b"\n"
        try:
            self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def receive(self) -> list[Message]:
        """What has come, up to a line's length at a time: who sends more than that waits, and fills no memory.

        Raises ValueError for what is no message; `closed` when there will be nothing more.
        """
        lines: list[bytes] = []
        try:
            data = self.socket.recv(_LONGEST)
            *lines, self._unread = (self._unread + data).split(b"\n")
            if len(self._unread) > _LONGEST:
                raise ValueError("too long")
            self.closed = not data
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        try:
            messages = [json.loads(line) for line in lines]
        except RecursionError:
            raise ValueError("too deep") from None
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("no message")
        return messages

    @property
    def is_cut(self) -> bool:
        """Whether what is sent does not arrive any more (Linux): the link is cut, or the host gone. A process that is
        stopped, or starved, has a kernel that answers for it."""
        with suppress(AttributeError, OSError):
            facts = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            again, unanswered, answered = facts[2], *struct.unpack_from("=I28xI", facts, 24)
            return bool(again >= _AGAIN and unanswered and answered >= 1000 * CUT)
        return False

    def close(self) -> None:
        self.closed = True
        self.socket.close()


class Peers:
    """The other ranks as this one hears them: `heard` has the last message and its moment, `gone` since when a
    connection has been closed without a word, `left` how those have ended that have said goodbye."""

    def __init__(self) -> None:
        self.lines: dict[int, Line] = {}
        self.heard: dict[int, tuple[float, Message]] = {}
        self.gone: dict[int, float] = {}
        self.left: dict[int, str] = {}
        self.messages: list[Message] = []
        """Messages that are more than a sign of life."""
        self._wake_here, self._wake_there = socket.socketpair()

    def wake(self) -> None:
        """Let `poll` return; from another thread."""
        with suppress(OSError):
            self._wake_there.send(b"x")

    def send(self, message: Message, must: bool = True) -> None:
        for line in list(self.lines.values()):
            line.send(message, must)

    def is_cut_off(self, rank: int) -> bool:
        """Whether nothing reaches a rank that there is a connection to."""
        return rank in self.lines and self.lines[rank].is_cut

    def poll(self, seconds: float) -> None:
        """Take in what comes within `seconds`, or at once when something does."""
        lines = {line.fileno(): rank for rank, line in self.lines.items() if not line.closed}
        poll = select.poll()
        for number in [self._wake_here.fileno(), *lines, *self._others()]:
            poll.register(number, select.POLLIN)
        ready = [number for number, _ in poll.poll(1000 * seconds)]
        for number in ready:
            if number in lines:
                self._take(lines[number])
        self._meet(ready)
        for rank in [rank for rank, line in self.lines.items() if line.closed]:
            self.lines.pop(rank).close()
            if rank not in self.left:
                self.gone.setdefault(rank, time.monotonic())

    def _take(self, rank: int) -> None:
        try:
            messages = self.lines[rank].receive()
        except ValueError:
            messages, self.lines[rank].closed = [], True
        self._hear(rank, messages)

    def _hear(self, rank: int, messages: list[Message]) -> None:
        for message in messages:
            if "place" in message:
                self.heard[rank] = time.monotonic(), message
            else:
                self.messages.append(message)
            if "bye" in message:
                self.left[rank] = str(message["bye"])

    def _others(self) -> list[int]:
        return []

    def _meet(self, ready: list[int]) -> None:
        pass

    def close(self) -> None:
        for line in self.lines.values():
            line.close()


class Hub(Peers):
    """Rank 0's end. `alone`: all ranks are on this machine, and only it can connect."""

    def __init__(self, world_size: int, secret: str, alone: bool) -> None:
        super().__init__()
        self.world_size = world_size
        address = "127.0.0.1" if alone else handshake.bind_address()
        self._lobby = handshake.Lobby(handshake.listen(address), secret, _PURPOSE)
        self._nameless: list[Line] = []
        """Connections of ours that have not said their rank yet."""
        where = [address] if handshake.is_one(address) else addresses()
        self.offer = Offer(where, self._lobby.listener.getsockname()[1], secret)

    def _others(self) -> list[int]:
        return [*self._lobby.filenos(), *(line.fileno() for line in self._nameless)]

    def _meet(self, ready: list[int]) -> None:
        self._nameless += [Line(connection) for connection in self._lobby.admit(ready)]
        for line in list(self._nameless):
            rank = self._named(line)
            if rank is not None or line.closed or time.monotonic() - line.opened > handshake.PATIENCE:
                self._nameless.remove(line)
                if rank is None:
                    line.close()
                else:
                    self.lines[rank] = line
                    line.send({"welcome": rank})

    def _named(self, line: Line) -> int | None:
        """The rank at the other end once it has said so; closes the line of whoever says anything else."""
        try:
            for message in line.receive():
                rank = message.get("rank")
                if isinstance(rank, int) and 0 < rank < self.world_size and rank not in self.lines:
                    return rank
                line.closed = True
        except ValueError:
            line.closed = True
        return None

    def close(self) -> None:
        super().close()
        self._lobby.close()
        for line in self._nameless:
            line.close()


class Spoke(Peers):
    """Any other rank's end. Raises OSError naming what it has tried when rank 0 cannot be reached."""

    def __init__(self, rank: int, offer: Offer) -> None:
        super().__init__()
        reasons = []
        for address in offer.addresses:
            try:
                connection = handshake.connect(address, offer.port, offer.secret, _PURPOSE)
            except OSError as error:
                reasons.append(f"{address} port {offer.port}: {error}")
                continue
            line = Line(connection)
            line.send({"rank": rank})
            if self._is_welcome(line, rank):
                self.lines[0] = line
                return
            line.close()
            reasons.append(f"{address} port {offer.port}: it does not take rank {rank}")
        raise OSError("; ".join(reasons))

    def _is_welcome(self, line: Line, rank: int) -> bool:
        """What comes after the welcome stays where it is."""
        deadline = time.monotonic() + handshake.WELCOME
        poll = select.poll()
        poll.register(line.fileno(), select.POLLIN)
        while not line.closed and time.monotonic() < deadline:
            poll.poll(1000 * max(0.0, deadline - time.monotonic()))
            with suppress(ValueError):
                if messages := line.receive():
                    self._hear(0, messages[1:])
                    return messages[0] == {"welcome": rank}
        return False


def state_of(pid: int) -> str:
    """`T` for a process of this machine that somebody has stopped; "" when there is no such process (Linux)."""
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0].upper()
    return ""
