"""The routes, as a Starlette application."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dflash_decode import LLM

from . import metrics, reading, tools
from .chat import ChatReplies
from .completions import CompletionReplies
from .constraints import field_of
from .desk import Answers, Desk
from .errors import ApiError
from .fields import Asked, ChatAsked, CompletionAsked
from .openapi import openapi
from .replies import Model, Models

Replies: TypeAlias = ChatReplies | CompletionReplies
_LEFT = 499  # what others call the status of an answer that nobody waits for


@dataclass(frozen=True)
class Settings:
    """name: the model's name. max_queue: answers that wait beyond those that the decoder has. max_body: bytes."""

    name: str
    api_key: str | None = None
    max_queue: int = 128
    max_body: int = 8 << 20


class Api:
    def __init__(self, llm: LLM, settings: Settings, max_batch: int):
        self.llm, self.settings = llm, settings
        self.metrics = metrics.Metrics(llm, settings.name)
        self.desk = Desk(llm, self.metrics, max_batch + settings.max_queue)
        self._reads_calls = tools.is_known(llm)
        self._model = Model(id=settings.name, created=int(time.time()), max_model_len=llm.max_context)

    async def chat(self, http: Request) -> Response:
        asked = await self._read(http, ChatAsked)
        calls = self._reads_calls and reading.tools(asked) is not None
        return await self._answer(http, asked, lambda: ChatReplies(asked, self.settings.name, calls))

    async def completions(self, http: Request) -> Response:
        asked = await self._read(http, CompletionAsked)
        return await self._answer(http, asked, lambda: CompletionReplies(asked, self.settings.name))

    async def models(self, http: Request) -> Response:
        return JSONResponse(Models(data=[self._model]).model_dump())

    async def model(self, http: Request) -> Response:
        if http.path_params["name"] != self.settings.name:
            raise ApiError(404, f"model must be {self.settings.name!r}; got {http.path_params['name'][:80]!r}", "model",
                           "model_not_found")
        return JSONResponse(self._model.model_dump())

    async def health(self, http: Request) -> Response:
        if self.llm.closed:
            raise ApiError(503, "the decoder has ended")
        return JSONResponse({"status": "ok"})

    async def measured(self, http: Request) -> Response:
        return Response(self.metrics.text(), media_type=metrics.CONTENT_TYPE)

    async def described(self, http: Request) -> Response:
        return JSONResponse(openapi())

    async def _read(self, http: Request, kind: type[reading.Kind]) -> reading.Kind:
        return await reading.read(http, kind, self.settings.name, self.settings.max_body)

    async def _answer(self, http: Request, asked: Asked, make: Callable[[], Replies]) -> Response:
        answers = self.desk.admit(asked.prompts, asked.choices)
        try:
            prompts = await asyncio.to_thread(reading.prompts, self.llm, asked)
            await answers.start(prompts, reading.params(asked, prompts, self.llm.max_context), field_of(asked))
            replies = make()
            if asked.stream:
                return EventStream(_events(answers, replies, asked.reports_usage), answers)
            found = await _unless_left(http, answers)
        except BaseException:
            answers.leave()
            raise
        if found is None:
            return Response(status_code=_LEFT)
        return Response(replies.whole(found, answers.usage), media_type="application/json")


async def _unless_left(http: Request, answers: Answers) -> list | None:
    """The whole answers; None once the client has left."""
    whole, left = asyncio.ensure_future(answers.all()), asyncio.ensure_future(reading.left(http))
    try:
        await asyncio.wait((whole, left), return_when=asyncio.FIRST_COMPLETED)
        if whole.done():
            return whole.result()
        answers.leave()
        return None
    finally:
        whole.cancel()
        left.cancel()


async def _events(answers: Answers, replies: Replies, usage: bool) -> AsyncIterator[str]:
    try:
        for text in replies.opening():
            yield f"data: {text}\n\n"
        async for index, chunk in answers:
            for text in replies.piece(index, chunk):
                yield f"data: {text}\n\n"
        if usage:
            yield f"data: {replies.ending(answers.usage)}\n\n"
    except ApiError as error:
        yield f"data: {error.body().model_dump_json()}\n\n"
    yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events of answers, which end with the connection."""

    def __init__(self, events: AsyncIterator[str], answers: Answers):
        super().__init__(events, media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.leave()


class Locked:
    """Lets requests to /v1 in with the key alone."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._expected = app, f"bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            word, _, key = given.partition(b" ")
            if not secrets.compare_digest(word.lower() + b" " + key.strip(), self._expected):
                error = ApiError(401, "Authorization must be 'Bearer KEY' with this server's key",
                                 code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                return await error.response()(scope, receive, send)
        await self._app(scope, receive, send)


def _refusal(http: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # of the router
        error = ApiError(error.status_code, f"{http.method} {http.url.path[:80]}: {error.detail.lower()}",
                         headers=error.headers)
    if isinstance(error, ClientDisconnect):
        return Response(status_code=_LEFT)
    return (error if isinstance(error, ApiError) else ApiError(500, "the server failed; its log says how")).response()


def build(llm: LLM, settings: Settings, max_batch: int) -> tuple[Starlette, Desk]:
    """The application, and where what it runs can be ended. max_batch: the LLM's."""
    api = Api(llm, settings, max_batch)
    routes = [Route("/v1/chat/completions", api.chat, methods=["POST"]),
              Route("/v1/completions", api.completions, methods=["POST"]),
              Route("/v1/models", api.models), Route("/v1/models/{name:path}", api.model),
              Route("/health", api.health), Route("/metrics", api.measured), Route("/openapi.json", api.described)]
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(
        (ApiError, HTTPException, ClientDisconnect, Exception), _refusal))
    if settings.api_key is not None:
        app.add_middleware(Locked, key=settings.api_key)
    return app, api.desk
