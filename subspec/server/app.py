"""The routes."""

import secrets
from collections.abc import AsyncIterator
from contextlib import ExitStack

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from subspec import __version__
from subspec.decoding.result import GenerationResult
from subspec.server.errors import ApiError, install, of_exception
from subspec.server.replies import DONE, ChatReply, CompletionReply, Reply, event
from subspec.server.requests import ChatRequest, CompletionRequest
from subspec.server.service import Generation, Service

MAX_BODY = 4 * 2**20
"""Bytes of a request's body."""


def build_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The application. ``api_key``: what requests below /v1 must bring; None: nothing."""

    def authorized(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")  # the bytes that were sent
        if api_key is not None and not secrets.compare_digest(given, f"Bearer {api_key}".encode()):
            message = "this server asks for an API key: send Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)

    app = FastAPI(title="SubSpec", version=__version__)
    app.add_middleware(LimitedBody)
    install(app, lambda status: service.telemetry.refused.labels(str(status)).inc())
    guarded = {"dependencies": [Depends(authorized)]}

    @app.post("/v1/chat/completions", **guarded)
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await respond(service, request, body, ChatReply(service.target.name))

    @app.post("/v1/completions", **guarded)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        return await respond(service, request, body, CompletionReply(service.target.name))

    @app.get("/v1/models", **guarded)
    async def models() -> dict:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}", **guarded)
    async def model(name: str) -> dict:
        service.check_model(name)
        return service.card()

    @app.get("/health")
    async def health() -> dict:
        service.check_engine()
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.telemetry.page(), media_type=CONTENT_TYPE_LATEST)

    return app


async def respond(service: Service, request: Request, body: ChatRequest | CompletionRequest, reply: Reply) -> Response:
    """Generate, and answer as a whole or as a stream."""
    service.check_model(body.model)
    with ExitStack() as stack:
        generation = Generation(service, request)
        stack.callback(generation.close)
        await generation.begin(body)
        if body.stream:
            return EventStream(events(generation, reply, body.includes_usage), stack.pop_all())
        return JSONResponse(reply.whole(await generation.result()))


async def events(generation: Generation, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
    """The server-sent events of a stream. A text that fails ends with an error."""
    for chunk in reply.opening():
        yield event(chunk)
    try:
        async for item in generation.events():
            if isinstance(item, GenerationResult):
                for chunk in reply.closing(item, with_usage):
                    yield event(chunk)
            elif item:
                yield event(reply.piece(item))
    except ClientDisconnect:
        return
    except Exception as error:
        yield event(of_exception(error).body())
    yield DONE


class EventStream(StreamingResponse):
    """A stream that closes its generation when it ends or the client has gone."""

    def __init__(self, content: AsyncIterator[str], closing: ExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._closing:
            await super().__call__(scope, receive, send)


class LimitedBody:
    """Refuses bodies beyond :data:`MAX_BODY` while they arrive."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, f"the body is larger than {MAX_BODY >> 20} MiB")
            return message

        await self.app(scope, limited, send)
