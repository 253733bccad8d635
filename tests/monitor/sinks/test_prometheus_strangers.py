"""The metrics server among strangers: few threads, few seconds, nothing for who has no token, TLS from files."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moe_dist.config import MonitorConfig, PrometheusConfig
from moe_dist.monitor.records import RunInfo, TrainRecord
from moe_dist.monitor.sinks import http_server
from moe_dist.monitor.sinks.prometheus import PrometheusSink

Make = Callable[..., TrainRecord]


def build(folder: Path, **keys: Any) -> PrometheusSink:
    return PrometheusSink(folder, MonitorConfig(prometheus=PrometheusConfig(port=0, **keys)))


@contextmanager
def serving(folder: Path, info: RunInfo, **keys: Any) -> Iterator[PrometheusSink]:
    sink = build(folder, **keys)
    sink.open(info)
    try:
        yield sink
    finally:
        sink.close()


def status(sink: PrometheusSink, path: str = "/metrics", **headers: str) -> int:
    request = urllib.request.Request(f"http://{sink.address}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def connect(sink: PrometheusSink) -> socket.socket:
    host, _, port = sink.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def scrapes() -> int:
    return sum(thread.name == "scrape" for thread in threading.enumerate())


def test_half_open_connections_make_no_threads_and_keep_nobody_out(tmp_path: Path, info: RunInfo) -> None:
    """Seen to fail with a thread for every connection, as `prometheus_client`'s own server makes them."""
    most = 0
    with serving(tmp_path, info) as sink, ExitStack() as strangers:
        for number in range(150):
            stranger = strangers.enter_context(connect(sink))
            with suppress(OSError):  # the oldest are cut
                stranger.send(b"GET /metrics HTTP/1.1\r\n" if number % 2 else b"")
            most = max(most, scrapes())
        assert status(sink) == 200
    assert 0 < most <= http_server.CONNECTIONS


@pytest.mark.parametrize(
    "said", [b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nX: " + b"y" * 70_000, b"\x16\x03\x01" * 99]
)
def test_who_says_nothing_useful_is_cut(
    tmp_path: Path, info: RunInfo, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also who keeps a connection alive with a byte now and then. Seen to fail without a limit for the whole
    connection: each byte began the time-out anew."""
    monkeypatch.setattr(http_server, "SECONDS", 1.0)
    with serving(tmp_path, info) as sink, connect(sink) as stranger:
        stranger.settimeout(0.2)
        with suppress(OSError):
            stranger.sendall(said)
        began = time.monotonic()
        while time.monotonic() - began < 60:
            try:
                if not stranger.recv(65536):
                    break
            except TimeoutError:
                with suppress(OSError):
                    stranger.send(b"z")
            except ConnectionError:
                break
        else:
            pytest.fail("never cut")
        assert status(sink) == 200


def test_a_page_is_written_once_for_many_scrapes(tmp_path: Path, info: RunInfo, train_record: Make) -> None:
    """Asking costs training nothing but the sending. Seen to fail with a page for every scrape."""
    with serving(tmp_path, info) as sink:
        written = 0
        collect = sink.metrics.collect

        def counted() -> Any:
            nonlocal written
            written += 1
            return collect()

        sink.metrics.collect = counted  # type: ignore[method-assign]
        assert [status(sink, f"/metrics?name[]={number}") for number in range(3)] == [200] * 3
        assert written == 1
        sink.train(train_record())
        assert status(sink) == 200
        assert written == 2
        assert status(sink, "/") == 404


@pytest.mark.parametrize("kind", ["file", "variable"])
def test_a_token(tmp_path: Path, info: RunInfo, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it nothing is shown but the health. Seen to fail with the comparison left out."""
    source = str(tmp_path / "token") if kind == "file" else "env:THE_TOKEN"
    (tmp_path / "token").write_text("a word\n")
    monkeypatch.setenv("THE_TOKEN", "a word")
    with serving(tmp_path, info, bearer_token=source) as sink:
        for wrong in (
            {},
            {"Authorization": "Bearer another"},
            {"Authorization": "a word"},
            {"Authorization": "Bearer é"},
        ):
            assert status(sink, **{name: value.encode().decode("latin-1") for name, value in wrong.items()}) == 401
        assert status(sink, Authorization="Bearer a word") == 200
        assert status(sink, "/healthz") == 503, "no step yet, said to anybody"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("no/such/file", "cannot be read: No such file or directory"),
        ("env:NO_SUCH_VARIABLE", "the environment has no variable NO_SUCH_VARIABLE"),
        (".", "cannot be read: Is a directory"),
        ("blank", "there is no token in it"),
        ("binary", "not a token; allowed: one line of printable ASCII"),
        ("two lines", "not a token; allowed: one line of printable ASCII"),
    ],
)
def test_a_token_that_cannot_be_used_is_an_error(
    tmp_path: Path, source: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is opened, where it would cost the sink alone: whoever asked for protection is told."""
    monkeypatch.chdir(tmp_path)
    for name, content in (("blank", b" \n"), ("binary", b"\xff\x00"), ("two lines", b"one\ntwo\n")):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'monitor.prometheus.bearer_token={source}: {why}')}$"):
        build(tmp_path, bearer_token=source)


def pair(folder: Path, name: str = "server") -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *words.split(), *names], check=True, capture_output=True, timeout=60)
    return certificate, key


def test_tls(tmp_path: Path, info: RunInfo) -> None:
    """Silent connections do not hold up the hand-shakes of others. Seen to fail with the listener itself wrapped."""
    certificate, key = pair(tmp_path)
    with serving(tmp_path, info, tls_certificate=certificate, tls_key=key) as sink, connect(sink):
        context = ssl.create_default_context(cafile=str(certificate))
        with urllib.request.urlopen(f"https://{sink.address}/metrics", timeout=30, context=context) as reply:
            assert b"moe_dist_run_info" in reply.read()
        assert '"__scheme__": "https"' in (tmp_path / "targets.json").read_text()
        with pytest.raises(OSError, match=r"CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(f"https://{sink.address}/metrics", timeout=30)


def test_files_of_tls_that_cannot_be_used_are_an_error(tmp_path: Path) -> None:
    """One line that names the key and the file."""
    certificate, key = pair(tmp_path)
    _, other = pair(tmp_path, "other")
    junk, locked = tmp_path / "junk", tmp_path / "locked.key"
    junk.write_text("no PEM")
    words = ["openssl", "ec", "-in", str(key), "-aes128", "-passout", "pass:word", "-out", str(locked)]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    gone, prometheus = tmp_path / "gone", "monitor.prometheus"
    for first, second, said in (
        (gone, key, f"{prometheus}.tls_certificate={gone}: cannot be read: No such file or directory"),
        (certificate, gone, f"{prometheus}.tls_key={gone}: cannot be read: No such file or directory"),
        (tmp_path, key, f"{prometheus}.tls_certificate={tmp_path}: cannot be read: Is a directory"),
        (junk, key, f"{prometheus}.tls_certificate={junk}: holds no certificate; allowed: a PEM file"),
        (key, key, f"{prometheus}.tls_certificate={key}: holds no certificate; allowed: a PEM file"),
        (certificate, junk, f"{prometheus}.tls_key={junk}: holds no private key; allowed: a PEM file"),
        (certificate, other, f"{prometheus}.tls_key={other}: not the key of {certificate}"),
        (certificate, locked, f"{prometheus}.tls_key={locked}: encrypted with a password; give a key without one"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            build(tmp_path, tls_certificate=first, tls_key=second)


def test_half_of_tls_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"tls_key=key\.pem: https needs tls_certificate beside it"):
        PrometheusConfig(port=0, tls_key=Path("key.pem"))
