"""Requests of many threads, answered in batches by one: a bounded queue before a `Generator`."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator

from gpt3jax.sample import generate, text_options

_POLL = 0.2  # seconds


class Full(Exception):
    """The queue has no room, or the batcher is closed: try again later."""


@dataclasses.dataclass(eq=False)
class Request:
    """Rows to generate, and what becomes of them.

    Attributes:
        on_tokens: called in the batcher's thread with the new tokens of each row, with None at
            the end, or with what went wrong.
        cancelled: set it, and no more is generated.
    """

    prompts: list[list[int]]
    options: list[text_options.Options]
    on_tokens: Callable[[list[list[int]] | Exception | None], None]
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
        prompts = [prompt for request in batch for prompt in request.prompts]
        options = [option for request in batch for option in request.options]
        rows = [row for request in batch for row in range(len(request.prompts))]
        try:
            for new in self._generator.stream(prompts, options, rows):
                for request in batch:
                    request.on_tokens(new[: len(request.prompts)])
                    new = new[len(request.prompts) :]
                if all(request.cancelled for request in batch):
                    return
        except Exception as error:  # whatever it is, the server goes on
            for request in batch:
                request.on_tokens(error)
            return
        for request in batch:
            request.on_tokens(None)
