"""Generation over HTTP: OpenAI's completions, and Megatron's `PUT /api`.

A request is read here, in the event loop, and answered by the thread of a `batcher.Batcher`.
A field that is not supported is refused with 400, never ignored.
"""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import TypeAlias

import uvicorn
from starlette import applications, exceptions, requests, responses, routing, types

from gpt3jax import errors
from gpt3jax.sample import batcher, body_fields, generation_job, megatron_api, openai_api

_MEGATRON_PATH = "/api"
_CLIENT_GONE = 499  # nginx's code for it; nobody reads it

Answer: TypeAlias = openai_api.Completion | megatron_api.Answer


def make_app(served: generation_job.ServedModel) -> applications.Starlette:
    """Return the application; its batcher's thread ends with it."""
    endpoints = _Endpoints(served)

    @contextlib.asynccontextmanager
    async def lifespan(app: applications.Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(endpoints.batcher.close)

    route: Callable[..., routing.Route] = routing.Route
    return applications.Starlette(
        lifespan=lifespan,
        routes=[
            route("/health", endpoints.health),
            route("/v1/models", endpoints.models),
            route("/v1/models/{name:path}", endpoints.model),
            route("/v1/completions", endpoints.completions, methods=["POST"]),
            route(_MEGATRON_PATH, endpoints.megatron, methods=["PUT"]),
        ],
        exception_handlers={
            body_fields.RefusedError: _refused,
            exceptions.HTTPException: _no_such_path,
            requests.ClientDisconnect: _gone,
            Exception: _failed,
        },
    )


def run(app: applications.Starlette, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; requests under way are answered first.

    Raises:
        UserError: the address cannot be listened on.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as error:
        raise errors.UserError(
            f"--server.host={host} --server.port={port} cannot be listened on ({error}): choose "
            "another",
            page="sampling.md#server",
        ) from error
    options = uvicorn.Config(app, timeout_keep_alive=30)
    with listening:
        uvicorn.Server(options).run(sockets=[listening])


class _Endpoints:
    """The answers to each path."""

    def __init__(self, served: generation_job.ServedModel):
        self._served = served
        self._created = int(time.time())
        limits = served.limits
        self.batcher = batcher.Batcher(served.generator, limits.max_rows, limits.max_queue)

    async def health(self, request: requests.Request) -> responses.Response:
        return responses.JSONResponse({"status": "ok"})

    async def models(self, request: requests.Request) -> responses.Response:
        return responses.JSONResponse({"object": "list", "data": [self._model_entry()]})

    async def model(self, request: requests.Request) -> responses.Response:
        if request.path_params["name"] != self._served.name:
            raise openai_api.unknown_model(self._served)
        return responses.JSONResponse(self._model_entry())

    async def completions(self, request: requests.Request) -> responses.Response:
        body = await self._body(request, openai_api.FIELDS)
        job = openai_api.read(self._served, body)
        answer = openai_api.Completion(self._served, job)
        parts = _Parts(job, self.batcher)
        if job.stream:
            events = _events(answer, parts, with_usage=job.usage_in_stream)
            return _EventStream(parts, events)
        return await _answer_while_connected(request, parts, _whole(answer, parts))

    async def megatron(self, request: requests.Request) -> responses.Response:
        body = await self._body(request, megatron_api.FIELDS)
        job = megatron_api.read(self._served, body)
        answer = megatron_api.Answer(self._served, job)
        parts = _Parts(job, self.batcher)
        return await _answer_while_connected(request, parts, _whole(answer, parts))

    def _model_entry(self) -> body_fields.JsonObject:
        entry: body_fields.JsonObject = {"id": self._served.name, "object": "model"}
        return entry | {"created": self._created, "owned_by": "gpt3jax"}

    async def _body(self, request: requests.Request, known: set[str]) -> body_fields.JsonObject:
        content, n_bytes, most = bytearray(), 0, self._served.limits.max_body_bytes
        async for chunk in request.stream():
            n_bytes += len(chunk)
            if n_bytes <= most:
                content += chunk
        # A body that is too long is still read to its end: most clients write all before they read.
        if n_bytes > most:
            message = f"the request has more than {most} bytes"
            raise body_fields.RefusedError(message, status=413)
        return body_fields.parse(bytes(content), known)


class _Parts:
    """The parts of a job as they come; leaving the context cancels the rest."""

    def __init__(self, job: generation_job.Job, answering: batcher.Batcher):
        """Queue the job; its parts arrive in the running event loop.

        Raises:
            RefusedError: too many requests wait.
        """
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[batcher.Part | Exception | None] = asyncio.Queue()
        self._request = batcher.Request(
            rows=job.rows,
            on_part=self._put,
            scored=job.scored,
            prompts_scored=job.scored and job.echo,
        )
        try:
            answering.submit(self._request)
        except batcher.FullError:
            message = "too many requests wait: try again later"
            raise body_fields.RefusedError(message, status=503) from None

    def __enter__(self) -> "_Parts":
        return self

    def __exit__(self, *error: object) -> None:
        self._request.cancelled = True

    async def __aiter__(self) -> AsyncIterator[batcher.Part]:
        while (part := await self._arrived.get()) is not None:
            if isinstance(part, Exception):
                raise part
            yield part

    def _put(self, part: batcher.Part | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, part)


class _EventStream(responses.StreamingResponse):
    """Server-sent events; the rest is cancelled even where the client leaves before the first."""

    def __init__(self, parts: _Parts, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream")
        self._parts = parts

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        with self._parts:
            await super().__call__(scope, receive, send)


async def _whole(answer: Answer, parts: _Parts) -> body_fields.JsonObject:
    async for part in parts:
        answer.add(part)
        if answer.done:
            break
    return answer.whole()


async def _answer_while_connected(
    request: requests.Request,
    parts: _Parts,
    answer: Coroutine[None, None, body_fields.JsonObject],
) -> responses.Response:
    """Return the answer, or an empty response as soon as the client has gone away."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    with parts:
        answering = asyncio.create_task(answer)
        watching = asyncio.create_task(wait_for_disconnect())
        try:
            await asyncio.wait([answering, watching], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, watching):
                task.cancel()  # without effect on a task that is done
        content, _ = await asyncio.gather(answering, watching, return_exceptions=True)
    if isinstance(content, asyncio.CancelledError):
        return responses.Response(status_code=_CLIENT_GONE)
    if isinstance(content, BaseException):
        raise content
    return responses.JSONResponse(content)


async def _events(
    answer: openai_api.Completion, parts: _Parts, *, with_usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events: choices as they come, then the usage if wanted, then [DONE]."""

    def event(content: Mapping[str, object]) -> str:
        return f"data: {json.dumps(content)}\n\n"

    head = answer.head | ({"usage": None} if with_usage else {})
    try:
        async for part in parts:
            for choice in answer.add(part):
                yield event(head | {"choices": [choice]})
            if answer.done:
                break
        if with_usage:
            yield event(head | {"choices": [], "usage": answer.usage()})
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status is sent already
        yield event(_error_body(str(error), "server_error"))


def _error_body(message: str, kind: str, field: str = "", code: str = "") -> body_fields.JsonObject:
    """Return OpenAI's body of an error."""
    error = {"message": message, "type": kind, "param": field or None, "code": code or None}
    return {"error": error}


async def _refused(
    request: requests.Request, error: body_fields.RefusedError
) -> responses.Response:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    headers = {"Retry-After": "1"} if error.status == 503 else None
    content = _error_body(str(error), kind, error.field, error.code)
    if request.scope["path"] == _MEGATRON_PATH:
        content["message"] = str(error)  # where Megatron's client looks
    return responses.JSONResponse(content, error.status, headers=headers)


async def _no_such_path(
    request: requests.Request, error: exceptions.HTTPException
) -> responses.Response:
    message = f"{request.method} {request.scope['path']}: {error.detail}"
    content = _error_body(message, "invalid_request_error")
    return responses.JSONResponse(content, error.status_code, headers=error.headers)


async def _gone(request: requests.Request, error: Exception) -> responses.Response:
    return responses.Response(status_code=_CLIENT_GONE)


async def _failed(request: requests.Request, error: Exception) -> responses.Response:
    return responses.JSONResponse(_error_body(str(error), "server_error"), 500)
