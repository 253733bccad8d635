"""A server from its socket to its end: TLS, signals, the requests that it finishes before it goes."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from moe_dist.serve.app import Service
from moe_dist.serve.engine_thread import EngineFailedError


def listen(host: str, port: int) -> socket.socket:
    """Raises ValueError where nobody can listen."""
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # With its protocol: asyncio sends at once (TCP_NODELAY) only where it reads there that this is TCP, and an
        # answer's second piece would wait 40 ms for the client's delayed acknowledgement of the first.
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}") from error
    return found


def run(
    service: Service,
    listener: socket.socket,
    *,
    ready: Callable[[], None],
    tls: tuple[Path, Path] | None = None,
    drain_seconds: int = 30,
) -> int:
    """Serve until SIGTERM or Ctrl-C, then answer what is under way, for so long at most. Returns the signal's number.

    Raises EngineFailedError once everybody has been told, and ValueError for TLS files that cannot be used.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        service.application,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=drain_seconds,
        ssl_certfile=None if tls is None else tls[0],
        ssl_keyfile=None if tls is None else tls[1],
    )
    try:
        config.load()
    except OSError as error:
        files = " ".join(map(str, tls or ()))
        raise ValueError(f"--tls-certificate, --tls-key: {files}: {error}") from error
    server = _Server(config, service, ready)
    asyncio.run(server.until_stopped(listener))
    if service.thread.failure is not None:
        raise EngineFailedError(service.thread.failure)
    return server.signal


class _Server(uvicorn.Server):
    """One that does not send itself the signal again that has ended it."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.ready, self.signal = service, ready, 0

    async def until_stopped(self, listener: socket.socket) -> None:
        thread = self.service.thread
        thread.failed = self._end
        thread.start(asyncio.get_running_loop())
        if self.service.trainings is not None:
            self.service.trainings.start()
        try:
            await self.serve([listener])
        finally:
            await asyncio.to_thread(thread.stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers and a training under way end side by side."""
        ends = [super().shutdown(sockets)]
        if self.service.trainings is not None:
            ends.append(self.service.trainings.stop(self.config.timeout_graceful_shutdown or 0))
        await asyncio.gather(*ends)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: object) -> None:
        self.force_exit = self.should_exit  # who asks twice will not wait
        if self.force_exit and self.service.trainings is not None:
            self.service.trainings.kill()
        self.signal = number
        self._end()

    def _end(self) -> None:
        self.service.application.is_draining = True
        self.should_exit = True
