"""What the routes share, and the way of a request from its body to its text."""

import asyncio
import copy
import math
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from subspec.config.schema import DecodingConfig
from subspec.decoding.result import GenerationResult
from subspec.errors import SubspecError
from subspec.server.errors import ApiError
from subspec.server.requests import ChatRequest, CompletionRequest, GenerationRequest
from subspec.server.telemetry import Telemetry
from subspec.server.worker import Job, Worker
from subspec.targets import Target


class Service:
    """What the routes share.

    Args:
        target: for its name, tokenizer and chat template.
        decoding: values of parameters that a request leaves out.
        queue: requests that may wait beside those that run.
    """

    def __init__(self, target: Target, worker: Worker, decoding: DecodingConfig, queue: int) -> None:
        # A copy: tokenizers must not encode here and decode in the worker at once.
        self.target = replace(target, tokenizer=copy.deepcopy(target.tokenizer))
        self.worker = worker
        self.engine = worker.scheduler.engine
        self.decoding = decoding
        self.places = worker.scheduler.texts + queue
        self.taken = 0
        self._started = int(time.time())
        self.request_s = 1.0  # a moving mean of finished requests
        self.telemetry = Telemetry(
            lambda: worker.scheduler.running, lambda: max(0, self.taken - worker.scheduler.running)
        )
        self._encoder = ThreadPoolExecutor(1, "encode")  # long prompts must not hold up streams

    async def encode(self, body: ChatRequest | CompletionRequest) -> list[int]:
        """The ids of a request's prompt. Raises ApiError if they are too many, or the template refuses the messages."""
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        try:
            ids = await asyncio.get_running_loop().run_in_executor(self._encoder, self._ids, body)
        except SubspecError as error:
            raise ApiError(400, str(error), param=param) from error
        if len(ids) >= self.engine.max_length:
            message = f"the prompt has {len(ids)} tokens, and prompt and answer together may have "
            message += f"{self.engine.max_length} (the server's decoding.max_length): shorten the prompt"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return ids

    def _ids(self, body: ChatRequest | CompletionRequest) -> list[int]:
        if isinstance(body, ChatRequest):
            return self.target.chat_ids([message.plain() for message in body.messages])
        if isinstance(body.prompt, str):
            return list(self.target.tokenizer(body.prompt)["input_ids"])
        return body.prompt

    def card(self) -> dict[str, Any]:
        """The model's entry of the list of models."""
        return {
            "id": self.target.name,
            "object": "model",
            "created": self._started,
            "owned_by": "subspec",
            "max_model_len": self.engine.max_length,
        }

    def check_engine(self) -> None:
        """Refuse everything behind the engine's end, with status 503."""
        if self.worker.end is not None:
            raise ApiError(503, f"the server is about to end ({self.worker.end})")

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served, with status 404."""
        if name not in (None, self.target.name):
            message = f"there is no model {name!r} here: this server has {self.target.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")


class Generation:
    """A request's place in the server, and the text that is generated for it.

    Args:
        request: watched for its client's going away.

    Raises:
        ApiError: all places are taken.
    """

    def __init__(self, service: Service, request: Request) -> None:
        service.check_engine()
        if service.taken >= service.places:
            seconds = str(max(1, min(60, math.ceil(service.request_s))))
            message = f"all {service.places} places of the server are taken: try again after {seconds} s"
            raise ApiError(503, message, code="queue_full", headers={"Retry-After": seconds})
        service.taken += 1
        self._service = service
        self._job = Job()
        self._running = False  # between its submission and its end
        self._began = time.perf_counter()
        self._watch = asyncio.create_task(self._until_gone(request.receive))

    async def begin(self, body: ChatRequest | CompletionRequest) -> None:
        """Hand the text to the engine, and wait until that has accepted it. Raises ApiError for a wrong request."""
        service, decoding = self._service, self._service.decoding
        ids = await service.encode(body)
        try:
            service.worker.submit(
                self._job,
                prompt_ids=ids,
                max_new_tokens=body.limit or decoding.max_new_tokens,
                stop=body.stop or decoding.stop,
                ignore_eos=decoding.ignore_eos if body.ignore_eos is None else body.ignore_eos,
                seed=secrets.randbits(31) if body.seed is None else body.seed,
                sampling=body.sampling(service.engine.sampler.sampling),
            )
            self._running = True
            await self._next()
        except SubspecError as error:
            named = str(error).partition("=")[0]
            default = "messages" if isinstance(body, ChatRequest) else "prompt"
            param = named if named in GenerationRequest.model_fields else default
            raise ApiError(400, str(error), param=param) from error

    async def events(self) -> AsyncIterator[str | GenerationResult]:
        """Pieces of the text as they become final, and then the result."""
        service, first = self._service, True
        while self._running:
            event = await self._next()
            seconds = time.perf_counter() - self._began
            if first:
                service.telemetry.first.observe(seconds)
                first = False
            if isinstance(event, GenerationResult):
                self._running = False
                service.telemetry.text_ended(event, seconds)
                service.request_s += (seconds - service.request_s) / 8
            yield event

    async def result(self) -> GenerationResult:
        """The finished text."""
        return [event async for event in self.events()][-1]

    def close(self) -> None:
        """Free the place at once, and the text's where it is still running."""
        self._watch.cancel()
        self._service.taken -= 1
        if self._running:
            self._service.telemetry.ended.labels("abort").inc()
            self._service.worker.cancel(self._job)

    async def _next(self) -> str | GenerationResult | None:
        event = await self._job.events.get()
        if isinstance(event, Exception):
            self._running = isinstance(event, ClientDisconnect)
            raise event
        return event

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._job.events.put_nowait(ClientDisconnect())
