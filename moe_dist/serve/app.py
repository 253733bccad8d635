"""The HTTP interface: what OpenAI's clients call, and what probes and Prometheus ask."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from moe_dist import __version__
from moe_dist.data.chat_template import chat_prompt
from moe_dist.generate.options import SamplingOptions
from moe_dist.generate.requests import Event
from moe_dist.serve.answers import Answers
from moe_dist.serve.audit import AuditLog
from moe_dist.serve.engine_thread import EngineFailedError, EngineThread, News, OverloadedError
from moe_dist.serve.errors import Refused
from moe_dist.serve.gate import Asked, Gate, Limits
from moe_dist.serve.keys import KeyRing
from moe_dist.serve.metrics import ServeMetrics
from moe_dist.serve.schema import (
    ERROR,
    ERROR_AS_JSON,
    ChatRequest,
    CompletionRequest,
    ErrorAnswer,
    InferAnswer,
    InferRequest,
    Message,
    SamplingRequest,
)
from moe_dist.serve.train_routes import train_routes
from moe_dist.serve.training import TrainingQueue

T = TypeVar("T")
_COMPLETION_TOKENS = 16
"""Of /v1/completions when nothing is said, as OpenAI has it."""


class Service:
    """One model behind OpenAI's interface. `application` is what an ASGI server runs."""

    def __init__(
        self,
        thread: EngineThread,
        name: str,
        *,
        limits: Limits,
        keys: KeyRing | None,
        audit: AuditLog | None,
        trainings: TrainingQueue | None = None,
    ) -> None:
        assert thread.engine.tokenizer is not None
        self.thread, self.name, self.limits, self.trainings = thread, name, limits, trainings
        self.engine, self.tokenizer = thread.engine, thread.engine.tokenizer
        self.has_keys = keys is not None
        self.metrics = ServeMetrics(thread.engine)
        self.started = int(time.time())
        self._encoder = ThreadPoolExecutor(1, "tokenizer")  # one: tokenizers are not made for several at a time
        self.application = Gate(
            _routes(self), keys=keys, limits=limits, metrics=self.metrics, audit=audit, cancel=thread.cancel
        )

    @property
    def is_ready(self) -> bool:
        return self.thread.failure is None and not self.application.is_draining

    def card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "moe-dist"}

    async def infer(self, request: Request, body: InferRequest) -> dict[str, Any]:
        prompt = await self._encode(self.engine.encode, body.prompt)
        answers, events = await self._begin(request, body, [prompt], body.prompt, self.limits.max_tokens)
        await _unless_gone(request, _all_of(events))
        [answer] = answers.answers
        return {"text": answer.text, "finish_reason": answer.finished, "usage": answers.usage()}

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        prompts = [await self._encode(self.engine.encode, prompt) for prompt in body.prompts]
        return await self._respond(request, body, prompts, body.prompt, is_chat=False)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        prompt = await self._encode(self._chat_prompt, body.messages)
        said = [message.as_text for message in body.messages]
        return await self._respond(request, body, [prompt], said, is_chat=True)

    def _chat_prompt(self, messages: list[Message]) -> list[int]:
        return chat_prompt(self.tokenizer, [message.as_text for message in messages])

    async def _run(self, function: Callable[[Any], T], argument: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._encoder, function, argument)

    async def _encode(self, encode: Callable[[Any], list[int]], prompt: Any) -> list[int]:
        try:
            return await self._run(encode, prompt)
        except ValueError as error:
            raise Refused(400, str(error), "invalid_prompt") from error

    async def _respond(
        self,
        request: Request,
        body: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        said: Any,
        *,
        is_chat: bool,
    ) -> Response:
        if body.model != self.name:
            raise Refused(404, f"model {body.model!r} is not here: {self.name!r} is", "model_not_found", param="model")
        default = self.limits.max_tokens if is_chat else _COMPLETION_TOKENS
        answers, events = await self._begin(request, body, prompts, said, default, is_chat=is_chat)
        if not body.stream:
            await _unless_gone(request, _all_of(events))
            return JSONResponse(answers.whole())
        # The status is known once the engine has taken the request.
        first: dict[str, Any] = await _unless_gone(request, anext(events))
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(
            _pieces(answers, first, events, with_usage), media_type="text/event-stream", headers=_NOT_BUFFERED
        )

    async def _begin(
        self,
        request: Request,
        body: SamplingRequest,
        prompts: list[list[int]],
        said: Any,
        default: int,
        *,
        is_chat: bool = False,
    ) -> tuple[Answers, AsyncIterator[dict[str, Any]]]:
        """Where answers gather, and what makes them. `default`: of max_tokens. Raises Refused."""
        limit = self.limits.max_tokens
        wanted = body.wanted_tokens or min(default, limit)
        if wanted > limit:
            raise Refused(400, f"max_tokens={wanted}: at most {limit} here", "max_tokens_too_large", param="max_tokens")
        try:
            options = body.sampling(wanted)
        except ValueError as error:
            raise Refused(422, str(error), "invalid_value") from error
        if options.json_schema is not None:  # what is compiled here the engine has ready
            try:
                await self._run(self.engine.json_answer, options)
            except ValueError as error:
                raise Refused(422, str(error), "invalid_json_schema", param="response_format") from error
        asked: Asked = request.scope["asked"]
        answers = Answers(self.name, self.tokenizer, [len(prompt) for prompt in prompts], is_chat)
        asked.prompt_tokens = sum(answers.prompt_sizes)
        asked.said = {"prompt": said}
        return answers, self._events(prompts, options, answers, asked)

    async def _events(
        self, prompts: list[list[int]], options: SamplingOptions, answers: Answers, asked: Asked
    ) -> AsyncIterator[dict[str, Any]]:
        """Pieces of a stream as they come. Raises Refused."""
        news: asyncio.Queue[tuple[int, int, News]] = asyncio.Queue()
        last = [time.monotonic()] * len(prompts)
        try:
            for index, prompt in enumerate(prompts):
                ticket: list[int] = []
                listener = partial(_hear, news, index, ticket)
                ticket.append(self.thread.submit(prompt, options, listener))
                asked.tickets.add(ticket[0])
            while asked.tickets:
                index, number, event = await news.get()
                if isinstance(event, Exception):
                    asked.tickets.discard(number)
                    raise event
                assert isinstance(event, Event)
                now = time.monotonic()
                is_first = not answers.answers[index].tokens
                (self.metrics.first_token if is_first else self.metrics.next_token).observe(now - last[index])
                last[index] = now
                if is_first:
                    self.metrics.prompt_tokens.inc(answers.prompt_sizes[index])
                self.metrics.inference_tokens.inc(len(event.tokens))
                asked.completion_tokens += len(event.tokens)
                if event.finished is not None:
                    asked.tickets.discard(number)
                    asked.finish_reason = event.finished
                piece = answers.add(index, event)
                asked.said["answers"] = [answer.text for answer in answers.answers]
                yield piece
        except OverloadedError as error:
            raise Refused(429, str(error), "server_overloaded", retry_after=1) from error
        except EngineFailedError as error:
            raise Refused(503, "the engine has failed; this server ends", "engine_failed", retry_after=30) from error
        except ValueError as error:  # of the engine: a prompt that is too long
            raise Refused(400, str(error), "context_length_exceeded") from error


_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_NOT_BUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def _hear(news: asyncio.Queue[tuple[int, int, News]], index: int, ticket: list[int], event: News) -> None:
    news.put_nowait((index, ticket[0], event))


async def _all_of(events: AsyncIterator[Any]) -> None:
    async for _ in events:
        pass


async def _pieces(
    answers: Answers, first: dict[str, Any], events: AsyncIterator[dict[str, Any]], with_usage: bool
) -> AsyncIterator[bytes]:
    nothing = {"usage": None} if with_usage else {}
    if answers.is_chat:
        yield _event(answers.first_piece() | nothing)
    yield _event(first | nothing)
    try:
        async for piece in events:
            yield _event(piece | nothing)
    except Refused as refused:  # the status has been sent
        yield b"data: " + refused.body + b"\n\n"
        return
    if with_usage:
        yield _event(answers.usage_piece())
    yield b"data: [DONE]\n\n"


def _event(piece: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(piece).encode() + b"\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T] | Any) -> T:
    """Its result; ended when the client closes the connection."""
    working = asyncio.ensure_future(work)
    going = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, going}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused(499, "the client has gone", "client_gone")
        return await working
    finally:
        going.cancel()
        working.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _routes(service: Service) -> FastAPI:
    app = FastAPIOffline(
        title="moe-dist",
        version=__version__,
        description="A mixture-of-experts model by OpenAI's interface.",
        redoc_url=None,
        static_url="/docs/assets",
        responses={"default": {"model": ErrorAnswer, "description": ERROR}},
    )

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return Response(error.body, error.status, dict(error.headers))

    @app.exception_handler(HTTPException)
    async def by_framework(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        answer = await refused(request, Refused(error.status_code, str(error.detail), code))
        answer.headers.update(error.headers or {})  # which methods there are
        return answer

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body") or None
        if first["type"] == "json_invalid":
            return await refused(request, Refused(400, "the body is no JSON", "invalid_json"))
        text = f"{field or 'body'}: {first['msg']}"
        return await refused(request, Refused(422, text[:500], "invalid_value", param=field and field[:100]))

    @app.get("/healthz", summary="Whether the engine lives")
    async def health() -> Response:
        return _state(service.thread.failure is None, "ok", "the engine has failed")

    @app.get("/readyz", summary="Whether requests are welcome")
    async def ready() -> Response:
        return _state(service.is_ready, "ready", "not ready")

    api = APIRouter(dependencies=[Security(HTTPBearer(auto_error=False))] if service.has_keys else [])

    @api.post("/v1/completions", summary="Go on from prompts")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await service.complete(request, body)

    @api.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await service.chat(request, body)

    @api.post("/infer", summary="A text in, a text out", response_model=InferAnswer)
    async def infer(request: Request, body: InferRequest) -> dict[str, Any]:
        return await service.infer(request, body)

    @api.get("/v1/models", summary="The model that is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @api.get("/v1/models/{name:path}", summary="The same by its name")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise Refused(404, f"model {name!r} is not here: {service.name!r} is", "model_not_found", param="model")
        return service.card()

    @api.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse, responses=ERROR_AS_JSON)
    async def metrics() -> Response:
        with suppress(EngineFailedError, TimeoutError):  # in the middle of a long pass the last ones must do
            async with asyncio.timeout(2):
                service.metrics.load = await service.thread.load()
        return Response(service.metrics.text(), media_type=_PROMETHEUS)

    api.include_router(train_routes(service.trainings))
    app.include_router(api)
    return app


def _state(is_good: bool, good: str, bad: str) -> Response:
    return JSONResponse({"status": good if is_good else bad}, 200 if is_good else 503)
