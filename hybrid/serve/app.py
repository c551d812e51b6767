"""The HTTP side: OpenAI's `/v1/models`, `/v1/chat/completions` and `/v1/completions` over a `Worker`, and `/health`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hybrid.serve.loading import Loaded
from hybrid.serve.protocol import ApiError, ChatRequest, CompletionRequest, Settings, parse
from hybrid.serve.text import ReplyText
from hybrid.serve.worker import Job, QueueFullError, Worker

BODY_BYTES = 4 << 20
"""The longest request body that is read."""
COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions where a request has none, as OpenAI documents it; a chat may use all that is left."""


@dataclass(frozen=True)
class Form:
    """How an endpoint words its replies. whole, piece: a choice's part that holds text; opening: the first piece."""

    prefix: str
    object: str
    chunk: str
    whole: Callable[[str], dict[str, Any]]
    piece: Callable[[str], dict[str, Any]]
    opening: dict[str, Any] | None = None


CHAT = Form(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"content": text} if text else {}},
    {"delta": {"role": "assistant", "content": ""}},
)
COMPLETION = Form(
    "cmpl-", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text}
)


class Reply:
    """A reply that is being decoded: iterate over it for pieces of text; afterwards finish_reason and usage hold."""

    def __init__(
        self, job: Job, arrivals: asyncio.Queue[list[int] | Exception], text: ReplyText, eos_token_ids: frozenset[int]
    ) -> None:
        self.job, self.arrivals, self.text, self.eos_token_ids = job, arrivals, text, eos_token_ids
        self.tokens = 0
        self.finish_reason: str | None = None

    async def __aiter__(self) -> AsyncIterator[str]:
        """Raises ClientDisconnect, and ApiError for what the worker met."""
        while self.finish_reason is None:
            arrived = await self.arrivals.get()
            if isinstance(arrived, ClientDisconnect):
                raise arrived
            if isinstance(arrived, Exception):  # which the worker has logged
                raise _failure(arrived) from arrived
            if piece := "".join(self._read(token) for token in arrived if self.finish_reason is None):
                yield piece
        if rest := self.text.end():
            yield rest

    def _read(self, token: int) -> str:
        self.tokens += 1
        if token in self.eos_token_ids:
            self.finish_reason = "stop"
            return ""
        piece = self.text.add(token)
        if self.text.stopped:
            self.finish_reason = "stop"
        elif self.tokens == self.job.max_new_tokens:
            self.finish_reason = "length"
        return piece

    @property
    def usage(self) -> dict[str, int]:
        """The end-of-turn token counts; tokens that were decoded behind a stop string do not."""
        prompt = len(self.job.prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.tokens,
            "total_tokens": prompt + self.tokens,
        }


class Server:
    """The endpoints for one model, called `name`."""

    def __init__(self, loaded: Loaded, worker: Worker, name: str) -> None:
        self.loaded, self.worker, self.name = loaded, worker, name
        self.eos_token_ids = frozenset(loaded.eos_token_ids)
        self.created = int(time.time())
        self._watchers: set[asyncio.Task[None]] = set()

    async def health(self, request: Request) -> Response:
        waiting, decoding = self.worker.load
        return JSONResponse({"status": "ok", "waiting": waiting, "decoding": decoding})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._require_model(request.path_params["name"])
        return JSONResponse(self._card())

    async def chat(self, request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request))
        self._require_model(asked.model)
        try:
            prompt = self.loaded.chat_prompt([message.model_dump() for message in asked.messages])
        except ValueError as error:
            raise ApiError(str(error), param="messages") from None
        text = ReplyText(self.loaded.tokenizer, stop=asked.stop)
        return await self._answer(request, asked, CHAT, prompt, None, text)

    async def completions(self, request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request))
        self._require_model(asked.model)
        prompt = asked.prompt if isinstance(asked.prompt, list) else self.loaded.tokenizer(asked.prompt)["input_ids"]
        vocabulary = self.loaded.model.config.vocab_size
        if wrong := [token for token in prompt if not 0 <= token < vocabulary]:
            raise ApiError(
                f"prompt: token {wrong[0]} does not exist; the model has 0 to {vocabulary - 1}", param="prompt"
            )
        if not prompt:
            raise ApiError("the prompt has no tokens", param="prompt")
        text = ReplyText(self.loaded.tokenizer, before=prompt[-8:], stop=asked.stop)
        return await self._answer(request, asked, COMPLETION, prompt, COMPLETION_TOKENS, text)

    async def _answer(
        self, request: Request, asked: Settings, form: Form, prompt: list[int], default: int | None, text: ReplyText
    ) -> Response:
        reply = self._begin(request, asked, prompt, default, text)
        head = {"id": form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": self.name}
        if asked.stream:
            events = self._events(reply, {**head, "object": form.chunk}, form, asked.wants_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        whole = form.whole("".join([piece async for piece in reply]))
        choice = {"index": 0, **whole, "logprobs": None, "finish_reason": reply.finish_reason}
        return JSONResponse({**head, "object": form.object, "choices": [choice], "usage": reply.usage})

    def _begin(
        self, request: Request, asked: Settings, prompt: list[int], default: int | None, text: ReplyText
    ) -> Reply:
        """Queue the request; ApiError if it does not fit."""
        room = self.loaded.max_length - len(prompt)
        limit = asked.max_tokens or max(1, room if default is None else min(default, room))
        if limit > room:
            raise ApiError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {limit}, but prompt and reply together have "
                f"at most {self.loaded.max_length} here: lower max_tokens, shorten the prompt or raise --max-length",
                param="max_tokens",
                code="context_length_exceeded",
            )
        arrivals: asyncio.Queue[list[int] | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(arrived: list[int] | Exception) -> None:
            loop.call_soon_threadsafe(arrivals.put_nowait, arrived)

        job = Job(prompt, limit, asked.sampling, asked.seed, deliver)
        try:
            self.worker.submit(job)
        except QueueFullError as error:
            raise ApiError(
                f"{error}: try again later", status=429, type="rate_limit_error", code="queue_full"
            ) from None
        watcher = loop.create_task(self._watch(request, job, arrivals))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return Reply(job, arrivals, text, self.eos_token_ids)

    async def _watch(self, request: Request, job: Job, arrivals: asyncio.Queue[list[int] | Exception]) -> None:
        """Free the request's place when its client is gone or has got its whole reply, which may have ended by a stop
        string, of which the engine knows nothing. ASGI calls both a disconnect."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.worker.cancel(job)
        arrivals.put_nowait(ClientDisconnect())

    async def _events(self, reply: Reply, head: dict[str, Any], form: Form, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events: a chunk for each piece of text, one with the reason of the end, and [DONE]."""
        if with_usage:
            head = {**head, "usage": None}

        def chunk(part: dict[str, Any], finish_reason: str | None = None) -> str:
            choice = {"index": 0, **part, "logprobs": None, "finish_reason": finish_reason}
            return _event({**head, "choices": [choice]})

        try:
            if form.opening is not None:
                yield chunk(form.opening)
            async for piece in reply:
                yield chunk(form.piece(piece))
            yield chunk(form.piece(""), reply.finish_reason)
            if with_usage:
                yield _event({**head, "choices": [], "usage": reply.usage})
            yield "data: [DONE]\n\n"
        except ClientDisconnect:
            return
        except ApiError as error:  # the status line is out already
            yield _event(error.body)

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "mamballama"}

    def _require_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                f"model {name!r} is not served here; it is {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )


def create_app(loaded: Loaded, *, name: str | None = None, max_batch: int = 8, max_queue: int = 64) -> Starlette:
    """An ASGI application that decodes up to max_batch requests at once while max_queue wait.

    The decoding thread lives from the application's startup to its shutdown; `app.state.worker` has it.
    """
    worker = Worker(loaded.engine, max_batch, max_queue)
    server = Server(loaded, worker, name or loaded.name)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.close()

    app = Starlette(
        routes=[
            Route("/health", server.health),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/completions", server.completions, methods=["POST"]),
        ],
        exception_handlers={
            ApiError: _refused,
            HTTPException: _refused,
            Exception: _refused,
            ClientDisconnect: _nobody,
        },
        lifespan=lifespan,
    )
    app.state.worker = worker
    return app


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES:
            raise ApiError(f"the request is longer than the {BODY_BYTES} bytes that are read", status=413)
    return body


async def _refused(request: Request, error: Exception) -> Response:
    failure = _failure(error)
    headers = {"Retry-After": "1"} if failure.status == 429 else getattr(error, "headers", None)
    return JSONResponse(failure.body, failure.status, headers=headers)


async def _nobody(request: Request, error: Exception) -> Response:
    """An answer because there must be one; the client has hung up."""
    return Response(status_code=499)


def _failure(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(
            f"{error.detail}: served are /v1/models, /v1/chat/completions and /v1/completions", status=error.status_code
        )
    return ApiError(f"the server failed: {type(error).__name__}: {error}", status=500, type="server_error")


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
