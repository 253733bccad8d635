"""The job's secret, and the way through a gate: who knows it comes through, nobody else."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.connect import gate, handshake
from launcher.connect.gate import LOOPBACK, Gate, Tunnel
from launcher.connect.secret import job_secret
from moe_dist.config import ConfigError

SECRET = "a secret of some length"


def test_a_file_is_made_once_for_all(tmp_path: Path) -> None:
    """By several machines at the same time. Seen to fail with a plain write: two of them have two secrets."""
    environ = {"MOE_DIST_SECRET_FILE": str(tmp_path / "new/secret")}
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(job_secret(environ))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found[0]) == 64
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["secret"]
    assert (tmp_path / "new/secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("environ", "wrong"),
    [
        ({"MOE_DIST_SECRET": "short"}, "MOE_DIST_SECRET: a secret of 5 characters; at least 16"),
        ({"MOE_DIST_SECRET_FILE": "open"}, "everybody can read this secret: chmod 600"),
        ({"MOE_DIST_SECRET_FILE": "open/below"}, "no secret for the machines of this run: .* set MOE_DIST_SECRET"),
    ],
)
def test_what_is_no_secret(environ: dict[str, str], wrong: str, tmp_path: Path) -> None:
    (tmp_path / "open").write_text("x" * 64)
    (tmp_path / "open").chmod(0o644)
    environ = {name: str(tmp_path / value) if "FILE" in name else value for name, value in environ.items()}
    with pytest.raises(ConfigError, match=wrong):
        job_secret(environ)


@pytest.fixture
def store() -> Iterator[socket.socket]:
    """What the gate leads to: it sends back what comes."""
    listener = socket.create_server((LOOPBACK, 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    def echo(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    yield listener
    listener.close()


def opened(store: socket.socket) -> int:
    listener = handshake.listen(LOOPBACK)
    port: int = listener.getsockname()[1]
    Gate(listener, SECRET, "store x", store.getsockname()[1])
    return port


def test_bytes_go_through_both_ways(store: socket.socket) -> None:
    """Megabytes at a time, several connections. Seen to fail with what one end does not take at once thrown away."""
    tunnel = Tunnel(LOOPBACK, opened(store), SECRET, "store x", 20)
    sent = os.urandom(3_000_000)

    def exchange() -> bytes:
        with socket.create_connection((LOOPBACK, tunnel.port), timeout=60) as connection:
            threading.Thread(target=connection.sendall, args=(sent,), daemon=True).start()
            found = b""
            while len(found) < len(sent):
                found += connection.recv(1 << 20)
            return found

    assert all(exchange() == sent for _ in range(3))


@pytest.mark.parametrize(
    ("secret", "purpose"), [("another secret of some length", "store x"), (SECRET, "store y"), (SECRET, "watchdog")]
)
def test_another_secret_or_run_is_refused_in_a_line(store: socket.socket, secret: str, purpose: str) -> None:
    """Nothing of what comes reaches the store. Seen to fail with `_is_right` always true, and with one purpose for
    all."""
    port = opened(store)
    with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: .*another secret; MOE_DIST_SECRET, or the file"):
        Tunnel(LOOPBACK, port, secret, purpose, 30)


def test_nobody_there_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_AGAIN", 0.05)
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: the machine with rank 0 does not answer there"):
            Tunnel(LOOPBACK, port, SECRET, "store x", 0.5)


def test_a_gate_that_is_none_is_refused(store: socket.socket) -> None:
    """A server that sends a challenge and takes any answer has not proved that it is ours."""
    with pytest.raises(ConfigError, match=r"somebody else answers there|another secret"):
        Tunnel(LOOPBACK, store_that_takes_all(), SECRET, "store x", 10)


def store_that_takes_all() -> int:
    listener = socket.create_server((LOOPBACK, 0))

    def serve() -> None:
        for _ in range(3):
            connection, _ = listener.accept()
            connection.sendall(os.urandom(32))
            connection.recv(64)
            connection.sendall(os.urandom(32))

    threading.Thread(target=serve, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port
