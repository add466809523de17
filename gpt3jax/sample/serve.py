"""Generation over HTTP: OpenAI's completions, and Megatron's `PUT /api`.

A request is read here, in the event loop, and answered by the thread of a `batcher.Batcher`.
Whatever is asked for and not supported is refused with 400, never left out.
"""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import uvicorn
from starlette import applications, exceptions, requests, responses, routing, types

from gpt3jax import errors
from gpt3jax.data import tokenizer
from gpt3jax.sample import batcher, completions, generate, job, megatron

_MEGATRON_PATH = "/api"
_CLIENT_GONE = 499  # nginx's word for it; nobody reads it


class _Parts:
    """The parts of a request under way, as they come; leaving it cancels the rest."""

    def __init__(self, asked: job.Job, answering: batcher.Batcher):
        """Queue the request; it is waited for in the loop that runs.

        Raises:
            RefusedError: too many wait.
        """
        self._loop, self._come = asyncio.get_running_loop(), asyncio.Queue[Any]()
        self._request = batcher.Request(
            [prompt.ids for prompt in asked.prompts],
            [asked.options] * len(asked.prompts),
            self._put,
            scored=asked.scored,
            prompts_scored=asked.scored and asked.echo,
        )
        try:
            answering.submit(self._request)
        except batcher.Full:
            message = "too many requests wait: try again later"
            raise job.RefusedError(message, status=503) from None

    def __enter__(self) -> "_Parts":
        return self

    def __exit__(self, *error: object) -> None:
        self._request.cancelled = True

    async def __aiter__(self) -> AsyncIterator[batcher.Part]:
        while (part := await self._come.get()) is not None:
            if isinstance(part, Exception):
                raise part
            yield part

    def _put(self, part: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._come.put_nowait, part)


class _EventStream(responses.StreamingResponse):
    """Server-sent events; the rest is cancelled even where the client leaves before the first."""

    def __init__(self, parts: _Parts, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream")
        self._parts = parts

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        with self._parts:
            await super().__call__(scope, receive, send)


class _Server:
    """The answers to each path."""

    def __init__(self, served: job.Served):
        self._served = served
        self._created = int(time.time())
        limits = served.limits
        self.batcher = batcher.Batcher(served.generator, limits.max_rows, limits.max_queue)

    async def health(self, request: requests.Request) -> responses.Response:
        return responses.JSONResponse({"status": "ok"})

    async def models(self, request: requests.Request) -> responses.Response:
        return responses.JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: requests.Request) -> responses.Response:
        if request.path_params["name"] != self._served.name:
            raise completions.unknown_model(self._served)
        return responses.JSONResponse(self._model())

    async def completions(self, request: requests.Request) -> responses.Response:
        body = await self._body(request, completions.FIELDS)
        asked = completions.read(self._served, body)
        answer = completions.Completion(self._served, asked)
        parts = _Parts(asked, self.batcher)
        if asked.stream:
            return _EventStream(parts, _events(answer, parts, asked.usage_in_stream))
        return await _while_there(request, parts, _whole(answer, parts))

    async def megatron(self, request: requests.Request) -> responses.Response:
        body = await self._body(request, megatron.FIELDS)
        asked = megatron.read(self._served, body)
        answer = megatron.Answer(self._served, asked)
        parts = _Parts(asked, self.batcher)
        return await _while_there(request, parts, _whole(answer, parts))

    def _model(self) -> dict[str, Any]:
        entry = {"id": self._served.name, "object": "model", "created": self._created}
        return entry | {"owned_by": "gpt3jax"}

    async def _body(self, request: requests.Request, known: set[str]) -> dict[str, Any]:
        content, n_bytes, most = bytearray(), 0, self._served.limits.max_body_bytes
        async for part in request.stream():
            n_bytes += len(part)
            if n_bytes <= most:
                content += part
        if n_bytes > most:  # and read to its end: most clients write all before they read
            raise job.RefusedError(f"the request has more than {most} bytes", status=413)
        return job.parse(bytes(content), known)


def make_app(
    generator: generate.Generator, text: tokenizer.Tokenizer, name: str, limits: job.Limits
) -> applications.Starlette:
    """Return the application; its batcher's thread ends with it."""
    server = _Server(job.Served(generator=generator, text=text, name=name, limits=limits))

    @contextlib.asynccontextmanager
    async def lifespan(app: applications.Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.batcher.close)

    route: Callable[..., routing.Route] = routing.Route
    return applications.Starlette(
        lifespan=lifespan,
        routes=[
            route("/health", server.health),
            route("/v1/models", server.models),
            route("/v1/models/{name:path}", server.model),
            route("/v1/completions", server.completions, methods=["POST"]),
            route(_MEGATRON_PATH, server.megatron, methods=["PUT"]),
        ],
        exception_handlers={
            job.RefusedError: _refused,
            exceptions.HTTPException: _no_such_path,
            requests.ClientDisconnect: _gone,
            Exception: _failed,
        },
    )


def run(app: applications.Starlette, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; what is under way is answered first.

    Raises:
        UserError: the address cannot be listened on.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as error:
        raise errors.UserError(
            f"--server.host={host} --server.port={port} cannot be listened on ({error}): choose "
            "another"
        ) from error
    options = uvicorn.Config(app, timeout_keep_alive=30)
    with listening:
        uvicorn.Server(options).run(sockets=[listening])


async def _whole(answer: completions.Completion | megatron.Answer, parts: _Parts) -> dict[str, Any]:
    async for part in parts:
        answer.add(part)
        if answer.done:
            break
    return answer.whole()


async def _while_there(
    request: requests.Request, parts: _Parts, answer: Coroutine[Any, Any, dict[str, Any]]
) -> responses.Response:
    """Return the answer, or nothing much as soon as the client has gone away."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    with parts:
        tasks = [asyncio.create_task(answer), asyncio.create_task(leave())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()  # which is nothing to one that is done
        told, _ = await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(told, asyncio.CancelledError):
        return responses.Response(status_code=_CLIENT_GONE)
    if isinstance(told, BaseException):
        raise told
    return responses.JSONResponse(told)


async def _events(
    answer: completions.Completion, parts: _Parts, with_usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events: choices as they come, with why each ended, then [DONE]."""

    def event(content: dict[str, Any]) -> str:
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
        yield event(_error(str(error), "server_error"))


def _error(message: str, kind: str, field: str = "", code: str = "") -> dict[str, Any]:
    """Return OpenAI's body of an error."""
    content = {"message": message, "type": kind, "param": field or None, "code": code or None}
    return {"error": content}


async def _refused(request: requests.Request, error: job.RefusedError) -> responses.Response:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    headers = {"Retry-After": "1"} if error.status == 503 else None
    content = _error(str(error), kind, error.field, error.code)
    if request.scope["path"] == _MEGATRON_PATH:
        content["message"] = str(error)  # where Megatron's client looks
    return responses.JSONResponse(content, error.status, headers=headers)


async def _no_such_path(
    request: requests.Request, error: exceptions.HTTPException
) -> responses.Response:
    message = f"{request.method} {request.scope['path']}: {error.detail}"
    content = _error(message, "invalid_request_error")
    return responses.JSONResponse(content, error.status_code, headers=error.headers)


async def _gone(request: requests.Request, error: Exception) -> responses.Response:
    return responses.Response(status_code=_CLIENT_GONE)


async def _failed(request: requests.Request, error: Exception) -> responses.Response:
    return responses.JSONResponse(_error(str(error), "server_error"), 500)
