"""Requests of many threads, answered in batches by one: a bounded queue before a `Generator`."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from gpt3jax.sample import generate, text_options

_POLL = 0.2  # seconds


class Full(Exception):
    """The queue has no room, or the batcher is closed: try again later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one step gave to a request: of each row its new tokens and their scores, if asked for.

    The first part comes before any token, and has the scores of the prompts instead, if asked for.
    """

    tokens: list[list[int]]
    scores: list[list[generate.Score]]
    prompt_scores: list[list[generate.Score]]


@dataclasses.dataclass(eq=False)
class Request:
    """Rows to generate, and what becomes of them.

    Attributes:
        on_part: called in the batcher's thread with each part, with None at the end, or with what
            went wrong.
        scored: the new tokens' scores are asked for.
        prompts_scored: those of the prompts' tokens are, too.
        cancelled: set it, and no more is generated.
    """

    prompts: list[list[int]]
    options: list[text_options.Options]
    on_part: Callable[[Part | Exception | None], None]
    scored: bool = False
    prompts_scored: bool = False
    cancelled: bool = False


class Batcher:
    """One thread that generates for all requests, as many at a time as `max_rows` hold."""

    def __init__(self, generator: generate.Generator, max_rows: int, max_queue: int):
        """Start the thread."""
        self._generator, self._max_rows = generator, max_rows
        self._waiting: queue.Queue[Request] = queue.Queue(max_queue)
        self._held: Request | None = None  # did not fit the last batch
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request, whose rows are checked and at most `max_rows`.

        Raises:
            Full: there is no room.
        """
        if self._closing.is_set():
            raise Full
        try:
            self._waiting.put_nowait(request)
        except queue.Full:
            raise Full from None

    def close(self) -> None:
        """Take no more requests, answer those that wait, and end the thread."""
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            batch = list(self._next_batch())
            if batch:
                self._answer(batch)
            elif self._closing.is_set():
                return

    def _next_batch(self) -> Iterator[Request]:
        """Yield what waits, in its order, as far as the rows have room; wait for the first."""
        n_rows = 0
        try:
            first = self._held or self._waiting.get(timeout=_POLL)
            self._held = None
            while not n_rows or n_rows + len(first.prompts) <= self._max_rows:
                n_rows += len(first.prompts)
                yield first
                first = self._waiting.get_nowait()
            self._held = first
        except queue.Empty:
            return

    def _answer(self, batch: list[Request]) -> None:
        batch = [request for request in batch if not request.cancelled]
        if not batch:
            return
        try:
            self._score_prompts(batch)
            self._generate(batch)
        except Exception as error:  # whatever it is, the server goes on
            for request in batch:
                request.on_part(error)
            return
        for request in batch:
            request.on_part(None)

    def _score_prompts(self, batch: list[Request]) -> None:
        """Begin each request, with the scores of its prompts where it asks for them."""
        asking = [request for request in batch if request.prompts_scored]
        prompts = [prompt for request in asking for prompt in request.prompts]
        scores = self._generator.score(prompts) if prompts else []
        for request in batch:
            n = len(request.prompts)
            none: list[list[Any]] = [[] for _ in range(n)]
            own = none
            if request.prompts_scored:
                own, scores = scores[:n], scores[n:]
            request.on_part(Part(tokens=none, scores=none, prompt_scores=own))

    def _generate(self, batch: list[Request]) -> None:
        prompts = [prompt for request in batch for prompt in request.prompts]
        options = [option for request in batch for option in request.options]
        rows = [row for request in batch for row in range(len(request.prompts))]
        scored = any(request.scored for request in batch)
        for tokens, scores in self._generator.steps(prompts, options, rows, scored=scored):
            for request in batch:
                n = len(request.prompts)
                request.on_part(Part(tokens=tokens[:n], scores=scores[:n], prompt_scores=[]))
                tokens, scores = tokens[n:], scores[n:]
            if all(request.cancelled for request in batch):
                return
