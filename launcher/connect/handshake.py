"""Both ends of a connection prove that they know the job's secret, before anything else is read. Imports no torch.

A challenge and an answer of fixed length: nothing that a stranger sends is parsed, kept or compared byte by byte, and
the secret itself is never sent. What follows is neither encrypted nor signed.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import socket
import time
from contextlib import suppress

from launcher.connect.addresses import addresses, outward

logger = logging.getLogger("moe_dist")
BIND = "MOE_DIST_BIND"
"""The address on which ports for other machines listen; 0.0.0.0 or :: for all of this machine."""
PATIENCE = 5.0
"""Seconds in which a connection must have proved itself."""
WELCOME = 20.0
"""Seconds in which a connection must be made and answered."""
_STRANGERS = 256
"""Connections that have not proved themselves yet; one more, and the oldest is closed."""
_SIZE = 32  # bytes of a challenge, and of an HMAC-SHA256


class RefusedError(OSError):
    """The other end does not take this one for one of its own, or is none itself."""


class Lobby:
    """Connections to a listening socket that have not proved themselves. Never blocks; for somebody's poll loop.

    `purpose`: what the port is for. The answer for one is none for another.
    """

    def __init__(self, listener: socket.socket, secret: str, purpose: str) -> None:
        listener.setblocking(False)
        self.listener, self._secret, self._purpose = listener, secret, purpose
        self._strangers: dict[int, _Stranger] = {}
        self._has_warned = False

    def __len__(self) -> int:
        return len(self._strangers)

    def filenos(self) -> list[int]:
        """What to wait for."""
        return [self.listener.fileno(), *self._strangers]

    def admit(self, ready: list[int]) -> list[socket.socket]:
        """Go on with those of `ready` that are ours; returns connections that have now proved themselves, non-blocking
        and with nothing read beyond the proof."""
        if self.listener.fileno() in ready:
            self._accept()
        proven = []
        for number in [number for number in ready if number in self._strangers]:
            stranger = self._strangers[number]
            answer = stranger.read()
            if answer is None:
                continue
            del self._strangers[number]
            if len(answer) == 2 * _SIZE and self._is_right(stranger, answer):
                proven.append(stranger.connection)
            else:
                self._refuse(stranger)
        late = time.monotonic() - PATIENCE
        for number in [number for number, stranger in self._strangers.items() if stranger.since < late]:
            self._refuse(self._strangers.pop(number))
        return proven

    def _accept(self) -> None:
        for _ in range(_STRANGERS):
            try:
                connection, address = self.listener.accept()
            except OSError:  # nobody is left, or the process has too many files open
                return
            if len(self._strangers) >= _STRANGERS:
                self._refuse(self._strangers.pop(next(iter(self._strangers))))
            stranger = _Stranger(connection, str(address[0]))
            self._strangers[connection.fileno()] = stranger

    def _is_right(self, stranger: _Stranger, answer: bytes) -> bool:
        theirs, proof = answer[:_SIZE], answer[_SIZE:]
        both = stranger.challenge + theirs
        if not hmac.compare_digest(proof, _proof(self._secret, f"{self._purpose} client", both)):
            return False
        try:  # the first bytes of a connection fit its buffer
            return stranger.connection.send(_proof(self._secret, f"{self._purpose} server", both)) == _SIZE
        except OSError:
            return False

    def _refuse(self, stranger: _Stranger) -> None:
        stranger.connection.close()
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: port %d: a connection from %s did not prove that it belongs to this run, and was closed; more of "
                "them are not reported",
                self._purpose,
                self.listener.getsockname()[1],
                stranger.address,
            )

    def close(self) -> None:
        self.listener.close()
        for stranger in self._strangers.values():
            stranger.connection.close()
        self._strangers.clear()


class _Stranger:
    """One connection before its proof."""

    def __init__(self, connection: socket.socket, address: str) -> None:
        connection.setblocking(False)
        self.connection, self.address, self.since = connection, address, time.monotonic()
        self.challenge, self._read = secrets.token_bytes(_SIZE), b""
        with suppress(OSError):
            connection.send(self.challenge)

    def read(self) -> bytes | None:
        """The whole answer, b"" when there will be none, None while it is incomplete."""
        try:
            data = self.connection.recv(2 * _SIZE - len(self._read))
        except BlockingIOError:
            return None
        except OSError:
            return b""
        self._read += data
        if not data:
            return b""
        return self._read if len(self._read) == 2 * _SIZE else None


def connect(address: str, port: int, secret: str, purpose: str, patience: float = WELCOME) -> socket.socket:
    """A connection to a `Lobby`, both ends proven; blocking. Raises OSError that says what is wrong."""
    connection = socket.create_connection((address, port), timeout=patience)
    try:
        challenge, mine = _receive(connection), secrets.token_bytes(_SIZE)
        both = challenge + mine
        connection.sendall(mine + _proof(secret, f"{purpose} client", both))
        if not hmac.compare_digest(_receive(connection), _proof(secret, f"{purpose} server", both)):
            raise RefusedError("somebody else answers there")
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return connection


def _receive(connection: socket.socket) -> bytes:
    found = b""
    while len(found) < _SIZE:
        data = connection.recv(_SIZE - len(found))
        if not data:
            raise RefusedError("it closed the connection: another run, or another secret")
        found += data
    return found


def _proof(secret: str, purpose: str, challenges: bytes) -> bytes:
    return hmac.new(secret.encode(), purpose.encode() + b"\0" + challenges, hashlib.sha256).digest()


def listen(address: str, port: int = 0) -> socket.socket:
    """A listening socket on one address of this machine, or on all where it is 0.0.0.0 or ::. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    both = address == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((address, port), family=family, backlog=1024, dualstack_ipv6=both)


def bind_address() -> str:
    """The one address of this machine that other machines of the run are to use; MOE_DIST_BIND says another."""
    if asked := os.environ.get(BIND):
        return asked
    found = []
    for name in [*addresses(), outward()]:
        with suppress(OSError):
            found += [str(address[0]) for *_, address in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)]
    for address in found:
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback and is_ours(address):
            return address
    return "127.0.0.1"


def is_one(address: str) -> bool:
    """Whether it is one address, and not all of them."""
    return address not in ("0.0.0.0", "::")


def is_ours(address: str) -> bool:
    """Whether this machine can listen on `address`."""
    with suppress(OSError):
        listen(address).close()
        return True
    return False
