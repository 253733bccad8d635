"""A small web server that strangers cannot make large: few threads, few seconds, one answer a connection."""

from __future__ import annotations

import hmac
import os
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

CONNECTIONS = 16
"""Served at the same time, a thread each; one more, and the oldest is closed."""
SECONDS = 10.0
"""From the start of a connection to its end, whatever it is busy with."""


class BoundedServer(WSGIServer):
    """Answers from `start` to `close`. Raises OSError when the address cannot be listened on."""

    request_queue_size = 64
    allow_reuse_port = False

    def __init__(self, host: str, port: int, app: WSGIApplication, tls: ssl.SSLContext | None = None) -> None:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, *_, address = found[0]
        self._tls = tls
        self._open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        self._room = threading.Semaphore(CONNECTIONS)
        super().__init__((str(address[0]), port), _Handler)
        self.set_app(app)
        self._thread = threading.Thread(target=self.serve_forever, name="metrics", daemon=True)

    def server_bind(self) -> None:
        """Without the reverse look-up of the name that `HTTPServer` does: it may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self._open):
            _cut(connection)
        self._thread.join(SECONDS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for it, within `CONNECTIONS`: the oldest goes, for a scrape is faster than any that waits."""
        if not self._room.acquire(blocking=False):
            with self._lock:
                oldest = next(iter(self._open), None)
            if oldest is not None:
                _cut(oldest)
            if not self._room.acquire(timeout=0.2):  # its thread computes an answer: that is no stranger's wait
                self.shutdown_request(request)
                return
        with self._lock:
            self._open[request] = time.monotonic()
        threading.Thread(target=self._serve, args=(request, client_address), name="scrape", daemon=True).start()

    def service_actions(self) -> None:
        """Twice a second: cut what takes too long."""
        late = time.monotonic() - SECONDS
        with self._lock:
            found = [connection for connection, since in self._open.items() if since < late]
        for connection in found:
            _cut(connection)

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        talk = request
        try:
            request.settimeout(SECONDS)
            if self._tls is not None:
                talk = self._tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
                with self._lock:  # the wrapper has taken the connection over
                    self._open[talk] = self._open.pop(request)
                talk.do_handshake()
            self.finish_request(talk, client_address)
        except (OSError, ValueError):
            pass  # cut, gone, or no HTTP
        finally:
            with self._lock:
                self._open.pop(request, None)
                self._open.pop(talk, None)
            self.shutdown_request(talk)
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing on the run's terminal."""


class _Handler(WSGIRequestHandler):
    """One request, nothing logged."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def get_stderr(self) -> Any:
        return _Nowhere()


class _Nowhere:
    """Where wsgiref writes tracebacks of answers that nobody waited for."""

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass


def _cut(connection: socket.socket) -> None:
    """Whoever reads or writes there wakes up."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def guarded(app: WSGIApplication, token: str) -> WSGIApplication:
    """`app` for those who send the bearer token."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        given = environ.get("HTTP_AUTHORIZATION", "")
        if hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return app(environ, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
        return [b"a bearer token is needed\n"]

    return answer


def read_token(source: str) -> str:
    """The token in a file, or in the variable NAME of `env:NAME`. Raises ValueError that names the key."""
    where = f"monitor.prometheus.bearer_token={source}"
    try:
        text = os.environ[source[4:]] if source.startswith("env:") else Path(source).read_text().strip()
    except KeyError:
        raise ValueError(f"{where}: the environment has no variable {source[4:]}") from None
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        text = "\0"
    if not text.strip():
        raise ValueError(f"{where}: there is no token in it")
    if not (text.isascii() and text.isprintable()):
        raise ValueError(f"{where}: not a token; allowed: one line of printable ASCII")
    return text.strip()


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """For a server with these PEM files. Raises ValueError that names the key of the one that cannot be used."""
    first, second = f"monitor.prometheus.tls_certificate={certificate}", f"monitor.prometheus.tls_key={key}"
    for where, path in ((first, certificate), (second, key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ValueError(f"{where}: cannot be read: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    def no_password() -> str:  # without it OpenSSL asks for one on the terminal, and the run waits
        raise ValueError(f"{second}: encrypted with a password; give a key without one")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(certificate)
    except ssl.SSLError:
        raise ValueError(f"{first}: holds no certificate; allowed: a PEM file") from None
    try:
        context.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"{second}: not the key of {certificate}") from None
        if error.reason is None:
            raise ValueError(f"{second}: holds no private key; allowed: a PEM file") from None
        raise ValueError(f"{first}, {second}: cannot be used: {error.reason.lower().replace('_', ' ')}") from None
    return context
