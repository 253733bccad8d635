"""A store of torch's on loopback, and a proven way to it from other machines. Imports no torch.

`TCPStore` asks nobody who he is, and whoever reaches it may write what all ranks read. So it listens on loopback only.
A `Gate` beside it listens for other machines, lets in who proves the job's secret, and copies bytes to and fro; a
`Tunnel` is the other end: a port on loopback that leads there.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import select
import selectors
import socket
import threading
import time
from collections import deque
from contextlib import suppress

from launcher.connect import handshake
from launcher.connect.handshake import BIND, Lobby, RefusedError, bind_address, is_ours, listen
from moe_dist.config import ConfigError

logger = logging.getLogger("moe_dist")
LOOPBACK = "127.0.0.1"
_CHUNK = 65536
_AGAIN = 0.5
"""Seconds between two tries to reach a gate that is not there yet."""
_REFUSALS = 3
"""Refusals in a row that are not taken for a gate that has too much to do."""


class Gate:
    """Proven connections go on to a port on loopback, as long as this process lives."""

    def __init__(self, listener: socket.socket, secret: str, purpose: str, port: int) -> None:
        self._lobby, self._port, self._pump = Lobby(listener, secret, purpose), port, Pump()
        threading.Thread(target=self._run, name="gate", daemon=True).start()

    def _run(self) -> None:
        while True:
            poll = select.poll()
            for number in self._lobby.filenos():
                poll.register(number, select.POLLIN)
            for connection in self._lobby.admit([number for number, _ in poll.poll(1000)]):
                try:
                    self._pump.join(connection, socket.create_connection((LOOPBACK, self._port), timeout=5))
                except OSError:
                    connection.close()


class Tunnel:
    """A port on loopback that leads through the gate at `host`:`port`, as long as this process lives.

    Waits until the gate is there, for `patience` seconds. Raises ConfigError when it is not, or when it does not accept
    this job's secret.
    """

    def __init__(self, host: str, port: int, secret: str, purpose: str, patience: float) -> None:
        self._host, self._gate, self._secret, self._purpose = host, port, secret, purpose
        self._pump = Pump()
        self._first: socket.socket | None = self._met(patience)
        self._listener = listen(LOOPBACK)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._run, name="tunnel", daemon=True).start()

    def _met(self, patience: float) -> socket.socket:
        deadline, refusals = time.monotonic() + patience, 0
        while True:
            try:
                return self._connect(max(1.0, deadline - time.monotonic()))
            except OSError as error:
                refusals = refusals + 1 if isinstance(error, RefusedError) else 0
                if refusals >= _REFUSALS:
                    raise ConfigError(
                        f"{self._host}:{self._gate}: {error}; MOE_DIST_SECRET, or the file of MOE_DIST_SECRET_FILE, "
                        "must be the same on every machine"
                    ) from None
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{self._host}:{self._gate}: the machine with rank 0 does not answer there: {error}"
                    ) from None
                time.sleep(_AGAIN)

    def _connect(self, patience: float) -> socket.socket:
        host = reached_at(self._host)
        return handshake.connect(host, self._gate, self._secret, self._purpose, min(patience, handshake.WELCOME))

    def _run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            try:
                there, self._first = self._first or self._connect(handshake.WELCOME), None
                self._pump.join(connection, there)
            except OSError as error:
                logger.warning("%s:%d: %s", self._host, self._gate, error)
                connection.close()


class Pump:
    """A thread that copies bytes between pairs of connections. What one end does not take is not read at the other."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_here, self._wake_there = socket.socketpair()
        self._selector.register(self._wake_here, selectors.EVENT_READ)
        self._new: deque[tuple[socket.socket, socket.socket]] = deque()
        threading.Thread(target=self._run, name="pump", daemon=True).start()

    def join(self, one: socket.socket, other: socket.socket) -> None:
        """From here on both are this thread's."""
        for connection in (one, other):
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._new.append((one, other))
        self._wake_there.send(b"x")

    def _run(self) -> None:
        while True:
            for key, events in self._selector.select():
                if key.data is None:
                    self._take_new()
                elif not key.data.move(events):
                    key.data.close()

    def _take_new(self) -> None:
        self._wake_here.recv(4096)
        while self._new:
            one, other = (_End(connection, self._selector) for connection in self._new.popleft())
            one.peer, other.peer = other, one
            one.watch()
            other.watch()


class _End:
    """One of two connections, and what it has still to be sent."""

    peer: _End

    def __init__(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        self._socket, self._selector = connection, selector
        self._unsent, self._is_open, self._events = b"", True, 0

    def watch(self) -> None:
        """Read only what the other end takes; write only when something is left."""
        events = 0 if self.peer._unsent else selectors.EVENT_READ
        events |= selectors.EVENT_WRITE if self._unsent else 0
        if events == self._events or not self._is_open:
            return
        if self._events:
            self._selector.unregister(self._socket)
        if events:
            self._selector.register(self._socket, events, self)
        self._events = events

    def move(self, events: int) -> bool:
        """False when this pair is over."""
        if not self._is_open:
            return True
        try:
            if events & selectors.EVENT_WRITE:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            if events & selectors.EVENT_READ:
                data = self._socket.recv(_CHUNK)
                if not data:
                    return False
                self.peer._put(data)
        except BlockingIOError:
            pass
        except OSError:
            return False
        self.watch()
        self.peer.watch()
        return True

    def _put(self, data: bytes) -> None:
        with suppress(BlockingIOError):
            data = data[self._socket.send(data) :]
        self._unsent = data

    def close(self) -> None:
        """Both ends."""
        for end in (self, self.peer):
            if end._is_open:
                end._is_open = False
                if end._events:
                    self._selector.unregister(end._socket)
                with suppress(OSError):  # the last words of one that has hung up
                    end._socket.send(end._unsent)
                end._socket.close()


def reached_at(host: str) -> str:
    """`host`, but for a name that leads this machine to its own loopback, where its gates do not listen."""
    found = _resolved(host)
    return bind_address() if found and ipaddress.ip_address(found).is_loopback and not _is_loopback(host) else host


def served_at(host: str) -> str:
    """The address of this machine on which to listen for others who come to `host`: the one of that name where this
    machine has it. MOE_DIST_BIND says another."""
    if os.environ.get(BIND):
        return bind_address()
    found = _resolved(host)
    if found and is_ours(found) and (_is_loopback(host) or not ipaddress.ip_address(found).is_loopback):
        return found
    return bind_address()


def is_here(host: str) -> bool:
    """Whether `host` is this machine."""
    found = _resolved(host)
    return found is not None and is_ours(found)


def _resolved(host: str) -> str | None:
    with suppress(OSError):
        return str(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0]).partition("%")[0]
    return None


def _is_loopback(host: str) -> bool:
    """Whether somebody asks for the loopback by name."""
    return host == "localhost" or host.startswith("127.") or host == "::1"
