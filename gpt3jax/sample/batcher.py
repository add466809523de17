"""Requests of many threads, answered in batches by one: a bounded queue before a `Generator`."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator

from gpt3jax.sample import generate

_POLL = 0.2  # seconds


class FullError(Exception):
    """The queue has no room, or the batcher is closed: try again later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one step adds to each row of a request.

    The first part comes before any token.

    Attributes:
        tokens: the new ones.
        scores: of the new tokens, if they are wanted.
        prompt_scores: of the prompts' tokens, in the first part, if they are wanted.
    """

    tokens: list[list[int]]
    scores: list[list[generate.Score]]
    prompt_scores: list[list[generate.Score]]


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """Rows to generate, and who gets the answer.

    Attributes:
        on_part: called in the batcher's thread with each part, with None at the end, or with an
            error.
        scored: whether scores of the new tokens are wanted.
        prompts_scored: whether scores of the prompts' tokens are wanted.
        cancelled: once it is set, nothing more is generated.
    """

    rows: list[generate.Row]
    on_part: Callable[[Part | Exception | None], None]
    scored: bool = False
    prompts_scored: bool = False
    cancelled: bool = False


class Batcher:
    """One thread that generates for all requests, at most `max_rows` rows at a time."""

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
            FullError: there is no room.
        """
        if self._closing.is_set():
            raise FullError
        try:
            self._waiting.put_nowait(request)
        except queue.Full:
            raise FullError from None

    def close(self) -> None:
        """Accept no more requests, answer those that wait, and end the thread."""
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
        """Yield waiting requests in order as long as their rows fit; wait for the first one."""
        n_rows = 0
        try:
            request = self._held or self._waiting.get(timeout=_POLL)
            self._held = None
            while not n_rows or n_rows + len(request.rows) <= self._max_rows:
                n_rows += len(request.rows)
                yield request
                request = self._waiting.get_nowait()
            self._held = request
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
        """Begin each request, with the scores of its prompts if they are wanted."""
        to_score = [request for request in batch if request.prompts_scored]
        prompts = [row.prompt for request in to_score for row in request.rows]
        scores = self._generator.score(prompts) if prompts else []
        for request in batch:
            n = len(request.rows)
            own: list[list[generate.Score]] = [[] for _ in range(n)]
            if request.prompts_scored:
                own, scores = scores[:n], scores[n:]
            nothing = Part(
                tokens=[[] for _ in range(n)], scores=[[] for _ in range(n)], prompt_scores=own
            )
            request.on_part(nothing)

    def _generate(self, batch: list[Request]) -> None:
        rows = [row for request in batch for row in request.rows]
        scored = any(request.scored for request in batch)
        for tokens, scores in self._generator.steps(rows, scored=scored):
            for request in batch:
                n = len(request.rows)
                request.on_part(Part(tokens=tokens[:n], scores=scores[:n], prompt_scores=[]))
                tokens, scores = tokens[n:], scores[n:]
            if all(request.cancelled for request in batch):
                return
