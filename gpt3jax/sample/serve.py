"""Generation over HTTP: OpenAI's completions, and Megatron's `PUT /api`.

A request is checked here, in the event loop, and answered by the thread of a `batcher.Batcher`.
Whatever is asked for and not supported is refused with 400, never left out.
"""

import asyncio
import contextlib
import dataclasses
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from starlette import applications, requests, responses, routing

from gpt3jax import config
from gpt3jax.data import tokenizer
from gpt3jax.sample import batcher, generate, row_text, text_options

# Fields that change nothing at these values, which clients send; at others they are refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1), "frequency_penalty": (None, 0), "presence_penalty": (None, 0),
    "logit_bias": (None, {}), "logprobs": (None, False), "suffix": (None, ""),
    "stream_options": (None,),
}  # fmt: skip
_COMPLETION_FIELDS = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "echo",
    "stream", "user", "ignore_eos", *_NEUTRAL,
}  # fmt: skip
_MEGATRON_FIELDS = {
    "prompts", "tokens_to_generate", "temperature", "top_k", "top_p", "add_BOS", "random_seed",
    "logprobs", "echo_prompts",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for, and how many may wait."""

    max_rows: int = 8
    max_queue: int = 32
    max_body_bytes: int = 1_000_000
    max_stops: int = 4


class _RefusedError(Exception):
    """What becomes an answer with an error status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """What both schemas come to: rows, and how each is told."""

    prompts: list[str]
    ids: list[list[int]]
    options: text_options.Options
    stops: tuple[str, ...] = ()
    echo: bool = False
    n: int = 1
    stream: bool = False


class _Server:
    """The answers to each path."""

    def __init__(
        self, generator: generate.Generator, text: tokenizer.Tokenizer, name: str, limits: Limits
    ):
        self._generator, self._text, self._name, self._limits = generator, text, name, limits
        self._created = int(time.time())
        self.batcher = batcher.Batcher(generator, limits.max_rows, limits.max_queue)

    async def health(self, request: requests.Request) -> responses.Response:
        return responses.JSONResponse({"status": "ok"})

    async def models(self, request: requests.Request) -> responses.Response:
        entry = {"id": self._name, "object": "model", "created": self._created}
        return responses.JSONResponse({"object": "list", "data": [entry | {"owned_by": "gpt3jax"}]})

    async def completions(self, request: requests.Request) -> responses.Response:
        try:
            body = await _read(request, self._limits.max_body_bytes, _COMPLETION_FIELDS)
            job = self._completion_job(body)
            parts = self._start(job)
        except _RefusedError as error:
            kind = "server_error" if error.status >= 500 else "invalid_request_error"
            content = {"error": {"message": str(error), "type": kind, "code": None, "param": None}}
            return responses.JSONResponse(content, error.status, headers=_retry(error.status))
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._name,
        }
        texts = self._texts(job)
        if job.stream:
            events = _events(head, job, texts, parts)
            return responses.StreamingResponse(events, media_type="text/event-stream")
        try:
            told = await _collect(job, texts, parts)
        except Exception as error:  # reported to the client; the server goes on
            content = {"error": {"message": str(error), "type": "server_error"}}
            return responses.JSONResponse(content, 500)
        n_prompt = sum(map(len, job.ids[:: job.n]))
        n_new = sum(len(text.tokens) for text in texts)
        usage = {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
        }
        choices = [
            _choice(i, t, text.reason) for i, (t, text) in enumerate(zip(told, texts, strict=True))
        ]
        return responses.JSONResponse(head | {"choices": choices, "usage": usage})

    async def megatron(self, request: requests.Request) -> responses.Response:
        try:
            body = await _read(request, self._limits.max_body_bytes, _MEGATRON_FIELDS)
            job = self._megatron_job(body)
            parts = self._start(job)
            texts = self._texts(job)
            told = await _collect(job, texts, parts)
        except _RefusedError as error:
            return responses.JSONResponse(str(error), error.status, headers=_retry(error.status))
        except Exception as error:  # as above
            return responses.JSONResponse(str(error), 500)
        segments = [
            [self._text.decode([token]) for token in [*ids, *text.tokens]]
            for ids, text in zip(job.ids, texts, strict=True)
        ]
        return responses.JSONResponse({"text": told, "segments": segments, "logprobs": None})

    def _completion_job(self, body: dict[str, Any]) -> _Job:
        for name, values in _NEUTRAL.items():
            if name in body and body[name] not in values:
                raise _RefusedError(400, f"{name} is not supported: leave it out")
        if body.get("model", self._name) != self._name:
            raise _RefusedError(404, f"model must be {self._name!r}, the one that is served")
        n = _field(body, "n", int, 1)
        if n < 1:
            raise _RefusedError(400, f"n={n} must be at least 1")
        given = body.get("prompt", "")
        prompts = given if isinstance(given, list) and given else [given]
        if all(type(token) is int for token in prompts):
            prompts = [prompts]
        self._check_rows(len(prompts) * n)
        ids = [self._encode(prompt, "prompt") for prompt in prompts]
        stops = body.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise _RefusedError(400, "stop must be a text, or a list of texts that are not empty")
        if len(stops) > self._limits.max_stops:
            raise _RefusedError(
                400, f"stop has {len(stops)} texts: at most {self._limits.max_stops}"
            )
        options = text_options.Options(
            max_new_tokens=_field(body, "max_tokens", int, 16),
            temperature=_field(body, "temperature", float, 1.0),
            top_k=_field(body, "top_k", int, 0),
            top_p=_field(body, "top_p", float, 1.0),
            seed=_field(body, "seed", int, uuid.uuid4().int % 2**32),
            ignore_eod=_field(body, "ignore_eos", bool, False),
        )
        texts = [p if isinstance(p, str) else self._text.decode(p) for p in prompts]
        job = _Job(
            prompts=[t for t in texts for _ in range(n)],
            ids=[i for i in ids for _ in range(n)],
            options=options,
            stops=tuple(stops),
            echo=_field(body, "echo", bool, False),
            n=n,
            stream=_field(body, "stream", bool, False),
        )
        self._check(job)
        return job

    def _megatron_job(self, body: dict[str, Any]) -> _Job:
        prompts = body.get("prompts")
        if not isinstance(prompts, list) or not prompts:
            raise _RefusedError(400, "prompts must be a list of texts")
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise _RefusedError(400, "prompts must be a list of texts")
        self._check_rows(len(prompts))
        if _field(body, "logprobs", bool, False):
            raise _RefusedError(400, "logprobs is not supported: leave it out")
        top_k, top_p = _field(body, "top_k", int, 0), _field(body, "top_p", float, 0.0)
        temperature = _field(body, "temperature", float, 1.0)
        options = text_options.Options(
            max_new_tokens=_field(body, "tokens_to_generate", int, 64),
            # Megatron's top_k=1 is its way to ask for greedy decoding, and 0 means no top_p.
            temperature=0.0 if top_k == 1 else temperature,
            top_k=top_k,
            top_p=top_p or 1.0,
            seed=_field(body, "random_seed", int, uuid.uuid4().int % 2**32),
        )
        first = [self._text.eod_id] if _field(body, "add_BOS", bool, False) else []
        ids = [first + self._encode(prompt, "prompts") for prompt in prompts]
        echo = _field(body, "echo_prompts", bool, True)
        job = _Job(prompts=prompts, ids=ids, options=options, echo=echo)
        self._check(job)
        return job

    def _check(self, job: _Job) -> None:
        n_new, seq_len = job.options.max_new_tokens, self._generator.model.seq_len
        for prompt in job.ids:
            try:
                self._generator.check(prompt, job.options)
            except config.UserError as error:
                raise _RefusedError(400, str(error)) from None
            if n_new > self._generator.room(prompt):
                raise _RefusedError(
                    400,
                    f"a prompt of {len(prompt)} tokens and {n_new} more do not fit the context of "
                    f"{seq_len}: ask for fewer",
                )

    def _texts(self, job: _Job) -> list[row_text.RowText]:
        ignore = job.options.ignore_eod
        return [row_text.RowText(self._text, job.stops, ignore) for _ in job.ids]

    def _check_rows(self, n: int) -> None:
        if n > self._limits.max_rows:
            raise _RefusedError(400, f"{n} texts in one request: at most {self._limits.max_rows}")

    def _encode(self, prompt: Any, name: str) -> list[int]:
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:  # half of a surrogate pair
                raise _RefusedError(400, f"{name} is not text: {error}") from None
            return self._text.encode(prompt) or [self._text.eod_id]
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return prompt
        raise _RefusedError(400, f"{name} must be a text or a list of texts")

    def _start(self, job: _Job) -> AsyncIterator[list[list[int]]]:
        loop, parts = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def on_tokens(part: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(parts.put_nowait, part)

        request = batcher.Request(job.ids, [job.options] * len(job.ids), on_tokens)
        try:
            self.batcher.submit(request)
        except batcher.Full:
            raise _RefusedError(503, "too many requests wait: try again later") from None

        async def follow() -> AsyncIterator[list[list[int]]]:
            try:
                while (part := await parts.get()) is not None:
                    if isinstance(part, Exception):
                        raise part
                    yield part
            finally:
                request.cancelled = True  # also where the client went away

        return follow()


def make_app(
    generator: generate.Generator, text: tokenizer.Tokenizer, name: str, limits: Limits
) -> applications.Starlette:
    """Return the application; its batcher's thread ends with it."""
    server = _Server(generator, text, name, limits)

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
            route("/v1/completions", server.completions, methods=["POST"]),
            route("/api", server.megatron, methods=["PUT"]),
        ],
    )


def run(app: applications.Starlette, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; what is under way is answered first.

    Raises:
        UserError: the address cannot be listened on.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise config.UserError(
            f"--server.host={host} --server.port={port} cannot be listened on ({error}): choose "
            "another"
        ) from error
    options = uvicorn.Config(app, timeout_keep_alive=30)
    with listening:
        uvicorn.Server(options).run(sockets=[listening])


async def _read(request: requests.Request, max_bytes: int, known: set[str]) -> dict[str, Any]:
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > max_bytes:
            raise _RefusedError(413, f"the request has more than {max_bytes} bytes")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _RefusedError(400, f"the request is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise _RefusedError(400, "the request must be a JSON object")
    unknown = sorted(body.keys() - known)
    if unknown:
        raise _RefusedError(400, f"{unknown[0]!r} is not supported: leave it out")
    return body


def _field(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """Return a field, or the default where it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    right = isinstance(value, bool) == (kind is bool) and isinstance(value, kind)
    if kind is float and type(value) is int:
        right = True
    if not right:
        words = {int: "an integer", float: "a number", bool: "true or false"}
        raise _RefusedError(400, f"{name} must be {words[kind]}")
    return value


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


async def _collect(
    job: _Job, texts: list[row_text.RowText], parts: AsyncIterator[list[list[int]]]
) -> list[str]:
    """Return each row's text."""
    told = [prompt if job.echo else "" for prompt in job.prompts]
    async with contextlib.aclosing(parts):  # type: ignore[type-var]
        async for new in parts:
            for i, (text, tokens) in enumerate(zip(texts, new, strict=True)):
                told[i] += text.add(tokens)
            if all(text.reason for text in texts):
                break
    return [t + text.end() for t, text in zip(told, texts, strict=True)]


async def _events(
    head: dict[str, Any],
    job: _Job,
    texts: list[row_text.RowText],
    parts: AsyncIterator[list[list[int]]],
) -> AsyncIterator[str]:
    """Yield server-sent events: text as it comes, then why each row ended, then [DONE]."""

    def event(index: int, new: str, reason: str | None) -> str:
        return f"data: {json.dumps(head | {'choices': [_choice(index, new, reason)]})}\n\n"

    if job.echo:
        for i, prompt in enumerate(job.prompts):
            yield event(i, prompt, None)
    try:
        async with contextlib.aclosing(parts):  # type: ignore[type-var]
            async for new in parts:
                for i, (text, tokens) in enumerate(zip(texts, new, strict=True)):
                    if told := text.add(tokens):
                        yield event(i, told, None)
                if all(text.reason for text in texts):
                    break
        for i, text in enumerate(texts):
            rest = text.end()
            yield event(i, rest, text.reason)
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status is sent already
        yield f"data: {json.dumps({'error': {'message': str(error)}})}\n\n"


def _retry(status: int) -> dict[str, str] | None:
    return {"Retry-After": "1"} if status == 503 else None
