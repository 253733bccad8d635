"""What every request passes before anything of it is parsed: size, time, key, role; and a line about it after."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from moe_dist.serve.audit import AuditLog
from moe_dist.serve.errors import Refused
from moe_dist.serve.keys import ANYBODY, STRANGER, Client, KeyRing
from moe_dist.serve.metrics import ServeMetrics

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

NEEDED = {
    "/v1/models": "infer",
    "/v1/completions": "infer",
    "/v1/chat/completions": "infer",
    "/infer": "infer",
    "/train": "train",
    "/metrics": "metrics",
}
"""What a client must be allowed to do, there and below."""
OPEN = ("/healthz", "/readyz", "/docs", "/openapi.json")
"""That say nothing about the model or who uses it, and what is below."""


@dataclass(frozen=True)
class Limits:
    """Of one request."""

    body_bytes: int = 1_000_000
    body_seconds: float = 10.0
    request_seconds: float = 600.0
    max_tokens: int = 4096
    """Of an answer."""


@dataclass
class Asked:
    """What becomes of a request, for the audit log and for whoever must be told that its client has gone."""

    id: str
    client: Client = STRANGER
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    training: str | None = None
    """The id of one that the request is about."""
    said: dict[str, Any] = field(default_factory=dict)
    """Prompts and answers."""
    tickets: set[int] = field(default_factory=set)
    """Of the engine, still open."""


class Gate:
    """An ASGI application around another one, and the only one that talks to clients about who they are."""

    def __init__(
        self,
        app: App,
        *,
        keys: KeyRing | None,
        limits: Limits,
        metrics: ServeMetrics,
        audit: AuditLog | None,
        cancel: Callable[[int], None],
    ) -> None:
        self.app, self.keys, self.limits = app, keys, limits
        self.metrics, self.audit, self.cancel = metrics, audit, cancel
        self.is_draining = False

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        asked = Asked(uuid.uuid4().hex)
        reply = _Reply(send, asked.id)
        scope["asked"] = asked
        try:
            await self._answer(scope, receive, reply, asked)
        except Refused as refused:
            await reply.refuse(refused)
        except _GoneError:
            reply.status = reply.status or 499
        except Exception as error:
            shown = os.environ.get("MOE_DIST_DEBUG") == "1"
            logger.error("request %s has failed: %s: %s", asked.id, type(error).__name__, error, exc_info=shown)
            await reply.refuse(Refused(500, f"something went wrong here (request {asked.id})", "internal_error"))
        finally:
            for ticket in asked.tickets:
                self.metrics.cancelled.inc()
                self.cancel(ticket)
            self._tell(scope, asked, reply.status or 499, time.monotonic() - started)

    async def _answer(self, scope: Message, receive: Receive, reply: _Reply, asked: Asked) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limits.body_bytes:
            raise self._too_large()
        endpoint = _endpoint(scope["path"])
        if endpoint not in OPEN:
            asked.client = await self._client(headers)
            needed = NEEDED.get(endpoint)
            if needed is not None and not asked.client.may(needed):
                raise Refused(403, f"key {asked.client.name}: role {asked.client.role} may not do this", "wrong_role")
            if self.is_draining:
                raise Refused(503, "this server is being stopped", "shutting_down", retry_after=5)
            if needed in ("infer", "train"):
                asked.client.begin()
        body = await self._body(receive)
        try:
            async with asyncio.timeout(self.limits.request_seconds):
                await self.app(scope, _Replay(body, receive), reply)
        except TimeoutError:
            seconds = f"{self.limits.request_seconds:g} s"
            raise Refused(408, f"no answer within {seconds}: ask for fewer tokens", "request_timeout") from None

    async def _client(self, headers: dict[bytes, bytes]) -> Client:
        if self.keys is not None:
            return await self.keys.client(headers.get(b"authorization", b"").decode("latin-1"))
        # Without keys this machine is trusted, but not the pages that a browser on it shows: one whose name leads here
        # sends that name.
        host = headers.get(b"host", b"").decode("latin-1")
        with suppress(ValueError):  # a host that is none
            host = urlsplit(f"//{host}").hostname or ""
        if not is_loopback(host):
            raise Refused(403, "without keys only requests to localhost are answered", "wrong_host")
        return ANYBODY

    async def _body(self, receive: Receive) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.limits.body_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(
                408, f"the request was not whole within {self.limits.body_seconds:g} s", "request_timeout"
            ) from None

    def _too_large(self) -> Refused:
        return Refused(413, f"a request may have {self.limits.body_bytes:,} bytes", "request_too_large")

    def _tell(self, scope: Message, asked: Asked, status: int, seconds: float) -> None:
        path = scope["path"]
        endpoint = _endpoint(path)
        self.metrics.requests.labels(endpoint, str(status)).inc()
        self.metrics.seconds.labels(endpoint).observe(seconds)
        asked.client.spend("tokens_per_minute", asked.prompt_tokens + asked.completion_tokens)
        if self.audit is None or endpoint in OPEN:
            return
        client = scope.get("client")
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request": asked.id,
            "key": asked.client.name,
            "role": asked.client.role,
            "address": client[0] if client else None,
            "method": scope["method"],
            "path": path[:200],
            "status": status,
            "seconds": round(seconds, 4),
            "prompt_tokens": asked.prompt_tokens,
            "completion_tokens": asked.completion_tokens,
            "finish_reason": asked.finish_reason,
        }
        if asked.training is not None:
            line["training"] = asked.training
        self.audit.write(line, asked.said)


def _endpoint(path: str) -> str:
    """The one of NEEDED and OPEN that a path is, or is below; else `other`."""
    return next((one for one in (*NEEDED, *OPEN) if path == one or path.startswith(f"{one}/")), "other")


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


class _GoneError(Exception):
    """The client has closed the connection."""


class _Replay:
    """`receive` for an application: the body in one piece, then what comes after it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Reply:
    """`send` with the id of the request, that knows how far it has come."""

    def __init__(self, send: Send, request: str) -> None:
        self._send, self._request = send, request
        self.status: int | None = None
        self._is_stream = self._is_done = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self._request.encode())]
            self._is_stream = any(value.startswith(b"text/event-stream") for _, value in headers)
            message = {**message, "headers": headers}
        elif not message.get("more_body"):
            self._is_done = True
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        """As an answer, or within a stream that has begun as its last event."""
        if self._is_done:
            return
        if self.status is not None:
            if self._is_stream:
                await self._send({"type": "http.response.body", "body": b"data: " + refused.body + b"\n\n"})
            return
        headers = [(name.encode(), value.encode()) for name, value in refused.headers.items()]
        headers.append((b"content-length", str(len(refused.body)).encode()))
        await self({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self({"type": "http.response.body", "body": refused.body})
