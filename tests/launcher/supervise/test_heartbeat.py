"""Connections between watchdogs: ranks hear each other, and strangers do no harm."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from launcher.connect import handshake
from launcher.connect.addresses import addresses
from launcher.supervise.heartbeat import Hub, Peers, Spoke


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub(3, "the word", alone=True)
    yield made
    made.close()


def connect(hub: Hub, rank: int) -> Spoke:
    """A spoke, while the hub listens as it would in its own thread."""
    found: list[Spoke] = []
    thread = threading.Thread(target=lambda: found.append(Spoke(rank, hub.offer)))
    thread.start()
    until(hub, lambda: rank in hub.lines)
    thread.join(10)
    return found[0]


def until(peers: Peers, condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        peers.poll(0.05)


def test_who_is_heard_who_leaves_and_who_has_gone(hub: Hub) -> None:
    one, two = connect(hub, 1), connect(hub, 2)
    one.send({"place": [0.5, 3, "computing", None]})
    until(hub, lambda: 1 in hub.heard)
    assert hub.heard[1][1]["place"] == [0.5, 3, "computing", None]
    hub.send({"lost": "x"})
    until(two, lambda: two.messages)
    one.send({"bye": "done", "rank": 1})
    one.close()
    two.close()
    until(hub, lambda: not hub.lines)
    assert hub.left == {1: "done"}
    assert set(hub.gone) == {2}


GARBAGE = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes": bytes(range(256)) * 64 + b"\n",
    "the secret itself": b"the word".ljust(64),
    "half of a proof": b"x" * 40,
    "lines": b"{}\n" * 1_000_000,
    "length": b"x" * 1_000_000,
    "nothing": b"",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_strangers_are_sent_away(hub: Hub, garbage: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS row 18: nobody is taken for a rank, nothing breaks, and the ranks still come in."""
    monkeypatch.setattr(handshake, "PATIENCE", 0.3)
    with socket.create_connection(("127.0.0.1", hub.offer.port)) as stranger:
        stranger.setblocking(False)
        left = garbage
        for _ in range(30):
            with suppress(BlockingIOError, ConnectionError):
                left = left[stranger.send(left) :] if left else left
            hub.poll(0.02)
        until(hub, lambda: not hub._lobby)
        assert not hub.lines
    assert connect(hub, 1).lines.keys() == {0}


NONSENSE = {
    "no rank": b'{"rank": "1"}\n',
    "a rank too many": b'{"rank": 3}\n',
    "no object": b"[]\n",
    "depth": b"[" * 60_000 + b"\n",
    "length": b"x" * 1_000_000,
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE.keys())
def test_who_knows_the_secret_and_says_no_rank_is_sent_away(hub: Hub, nonsense: bytes) -> None:
    with known(hub) as connection:
        connection.setblocking(False)
        with suppress(BlockingIOError):
            connection.send(nonsense)
        until(hub, lambda: not hub._nameless)
        assert not hub.lines


def known(hub: Hub) -> socket.socket:
    """A connection that has proved itself and said nothing more."""
    found: list[socket.socket] = []
    thread = threading.Thread(
        target=lambda: found.append(handshake.connect("127.0.0.1", hub.offer.port, "the word", "watchdog"))
    )
    thread.start()
    until(hub, lambda: hub._nameless)
    thread.join(10)
    return found[0]


def test_a_flood_fills_no_memory_and_holds_nobody_up(hub: Hub) -> None:
    """Every call takes a line's length from a connection at most, also from one that is ours, and from strangers their
    64 bytes. Seen to fail with `receive` reading until nothing is left: one poll took in all that was sent meanwhile.
    """
    spoke = connect(hub, 1)
    line, taken = hub.lines[1], 0
    recv = line.socket.recv

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(line_socket, name)

        def recv(self, size: int) -> bytes:
            nonlocal taken
            data = recv(size)
            taken += len(data)
            return data

    line_socket, line.socket = line.socket, Counted()  # type: ignore[assignment]
    spoke.lines[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
    blob = b'{"place": [0.0, 1, "computing", null]}\n' * 50_000
    over = threading.Event()

    def flood() -> None:
        spoke.lines[0].socket.settimeout(5)
        with suppress(OSError):
            while not over.is_set():
                spoke.lines[0].socket.sendall(blob)

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    try:
        for _ in range(20):
            before = taken
            hub.poll(1.0)
            assert 0 < taken - before <= 65536
            assert len(line._unread) < 100
    finally:
        over.set()
        line_socket.close()
        thread.join(10)


def test_silent_strangers_do_not_keep_ranks_out(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """More than the hub waits for: the oldest must go, with one warning. Seen to fail with a full lobby that takes
    nobody in: the rank waits until they are late."""
    strangers = [socket.create_connection(("127.0.0.1", hub.offer.port)) for _ in range(300)]
    for _ in range(3):
        hub.poll(0.01)
    assert len(hub._lobby) == 256
    assert connect(hub, 1).lines.keys() == {0}
    assert [record.getMessage() for record in caplog.records if "did not prove" in record.getMessage()] == [
        f"watchdog: port {hub.offer.port}: a connection from 127.0.0.1 did not prove that it belongs to this run, and "
        "was closed; more of them are not reported"
    ]
    for stranger in strangers:
        stranger.close()


def test_a_rank_that_talks_nonsense_has_gone(hub: Hub) -> None:
    spoke = connect(hub, 1)
    spoke.lines[0].socket.send(b"{nonsense\n")
    until(hub, lambda: 1 in hub.gone)


def test_the_same_rank_does_not_come_twice(hub: Hub) -> None:
    first = connect(hub, 1)
    with known(hub) as second:
        second.settimeout(10)
        second.send(b'{"rank": 1}\n')
        for _ in range(10):
            hub.poll(0.05)
        assert hub.lines.keys() == {1}
        assert second.recv(100) == b"", "closed"
    assert not first.lines[0].closed


def test_who_does_not_read_holds_nobody_up(hub: Hub) -> None:
    """As a stopped process: what it does not take in is not piled up."""
    deaf = connect(hub, 1)
    began = time.monotonic()
    for _ in range(2000):
        hub.send({"place": [0.0, 1, "computing", None], "inside": "x" * 5000}, must=False)
    assert time.monotonic() - began < 10
    assert len(hub.lines[1]._unsent) < 10_000
    until(deaf, lambda: 0 in deaf.heard)


def test_an_interface_that_is_named_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert addresses()[0] == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-one")
    assert addresses()
