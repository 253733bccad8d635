"""Ranks tell each other where they are, over connections that training does not share. Imports no torch.

A star: rank 0 listens, the others connect, each sends a line of JSON now and then. Nothing here ever blocks for long,
so that a link that is cut, a stopped process or a stranger holds nobody up.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
import select
import socket
import struct
import time
from contextlib import suppress
from typing import Any, NamedTuple

Message = dict[str, Any]
PATIENCE = 5.0
"""Seconds in which a connection must say who it is."""
_WELCOME = 20.0
"""Seconds in which a connection must be made and answered."""
_LONGEST = 65536
_STRANGERS = 256
"""Connections that have not yet said who they are; more have to wait."""
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SIOCGIFADDR = 0x8915
CUT = 8.0
"""Seconds for which nothing that was sent has arrived, after which a link counts as cut."""
_AGAIN = 3
"""Times in a row that something has been sent again and not arrived."""


class Offer(NamedTuple):
    """Where rank 0 listens, and the word that keeps strangers out."""

    addresses: list[str]
    port: int
    token: str


class Line:
    """One connection: messages out and in, without waiting."""

    def __init__(self, connection: socket.socket, unread: bytes = b"") -> None:
        connection.setblocking(False)
        self.socket, self.opened, self.closed = connection, time.monotonic(), False
        self._unsent, self._unread = b"", unread

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
        """What has come. Raises ValueError for what is no message; `closed` when there will be nothing more."""
        lines: list[bytes] = []
        try:
            while data := self.socket.recv(_LONGEST):
                *more, self._unread = (self._unread + data).split(b"\n")
                lines += more
                if len(self._unread) > _LONGEST:
                    raise ValueError("too long")
            self.closed = True
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
        self.told: list[Message] = []
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
        for message in messages:
            if "place" in message:
                self.heard[rank] = time.monotonic(), message
            else:
                self.told.append(message)
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

    def __init__(self, world_size: int, token: str, alone: bool) -> None:
        super().__init__()
        self.world_size, self.token = world_size, token
        self._strangers: list[Line] = []
        if alone:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        elif socket.has_dualstack_ipv6():
            self._listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            self._listener = socket.create_server(("", 0), backlog=1024)
        self._listener.setblocking(False)
        self.offer = Offer(["127.0.0.1"] if alone else addresses(), self._listener.getsockname()[1], token)

    def _others(self) -> list[int]:
        listening = [self._listener.fileno()] if len(self._strangers) < _STRANGERS else []
        return [*listening, *(line.fileno() for line in self._strangers)]

    def _meet(self, ready: list[int]) -> None:
        if self._listener.fileno() in ready:
            with suppress(OSError):
                while len(self._strangers) < _STRANGERS:
                    self._strangers.append(Line(self._listener.accept()[0]))
        for line in list(self._strangers):
            rank = self._introduced(line)
            if rank is not None or line.closed or time.monotonic() - line.opened > PATIENCE:
                self._strangers.remove(line)
                if rank is None:
                    line.close()
                else:
                    self.lines[rank] = line
                    line.send({"welcome": rank})

    def _introduced(self, line: Line) -> int | None:
        """The rank at the other end once it has said the word; closes the line of whoever says anything else."""
        try:
            for message in line.receive():
                rank = message.get("rank")
                known = hmac.compare_digest(str(message.get("token")).encode(), self.token.encode())
                if known and isinstance(rank, int) and 0 < rank < self.world_size and rank not in self.lines:
                    return rank
                line.closed = True
        except ValueError:
            line.closed = True
        return None

    def close(self) -> None:
        super().close()
        self._listener.close()
        for line in self._strangers:
            line.close()


class Spoke(Peers):
    """Any other rank's end. Raises OSError naming what it has tried when rank 0 cannot be reached."""

    def __init__(self, rank: int, offer: Offer) -> None:
        super().__init__()
        reasons = []
        for address in offer.addresses:
            try:
                connection = socket.create_connection((address, offer.port), timeout=_WELCOME)
                connection.sendall(json.dumps({"token": offer.token, "rank": rank}).encode() + b"\n")
                answer, _, more = connection.recv(4096).partition(b"\n")
                if json.loads(answer) != {"welcome": rank}:
                    raise OSError("somebody else answers there")
            except (OSError, ValueError) as error:
                reasons.append(f"{address} port {offer.port}: {error}")
                continue
            self.lines[0] = Line(connection, more)
            return
        raise OSError("; ".join(reasons))


def addresses() -> list[str]:
    """Where others may reach this machine, the best guess first."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for variable in _INTERFACES:
            name = os.environ.get(variable, "").partition(",")[0].lstrip("=")
            with suppress(OSError):
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(answer[20:24]))
    master = os.environ.get("MASTER_ADDR", "")
    with suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe, suppress(OSError):
                probe.connect(place)  # sends nothing: asks only which interface leads there
                found.append(probe.getsockname()[0])
    found += [socket.gethostname(), master]
    return [address for address in dict.fromkeys(found) if address]


def state_of(pid: int) -> str:
    """`T` for a process of this machine that somebody has stopped; "" when there is no such process (Linux)."""
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0].upper()
    return ""
