"""Continuing prompts on a terminal: the texts on stdout, how fast they came on stderr."""

import dataclasses
import sys
import time
from collections.abc import Iterator

from gpt3jax import errors
from gpt3jax.data import tokenizer as tokenization
from gpt3jax.sample import generate, generated_text, sampling_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """How prompts are continued, and by what.

    Attributes:
        n_per_prompt: texts of each prompt.
        batch_size: texts that are generated at a time.
    """

    generator: generate.Generator
    tokenizer: tokenization.Tokenizer
    options: sampling_options.Options
    n_per_prompt: int
    batch_size: int

    def run(self, prompts: list[str]) -> None:
        """Print each prompt with its continuations, and how fast they came.

        Raises:
            UserError: a prompt cannot be continued.
        """
        ids = {prompt: self._encode(prompt) for prompt in prompts}
        for prompt in prompts:
            self.generator.check(ids[prompt], self.options)
        rows = [
            (prompt, generate.Row(prompt=ids[prompt], options=self.options, number=number))
            for prompt in prompts
            for number in range(self.n_per_prompt)
        ]
        totals = _Totals()
        for i in range(0, len(rows), self.batch_size):
            batch = rows[i : i + self.batch_size]
            self._print_batch([prompt for prompt, _ in batch], [row for _, row in batch], totals)
        totals.report(self.generator.model.seq_len)

    def _encode(self, prompt: str) -> list[int]:
        try:
            return self.tokenizer.encode(prompt) or [self.tokenizer.eod_id]
        except errors.UserError as error:
            raise errors.UserError(
                f"--prompt is not UTF-8 text: {error.message}", page="sampling.md"
            ) from None

    def _print_batch(self, prompts: list[str], rows: list[generate.Row], totals: "_Totals") -> None:
        """Print a single text as it comes, several when all are complete: they would mix."""
        is_single = len(rows) == 1
        if is_single:
            print(prompts[0], end="", flush=True)
        texts = [generated_text.begin(self.generator, self.tokenizer, row) for row in rows]
        printed = prompts
        for tokens in self.generator.stream(rows):
            totals.note_first_token()
            added = [text.add(ids) for text, ids in zip(texts, tokens, strict=True)]
            printed = [before + new for before, new in zip(printed, added, strict=True)]
            if is_single:
                print(added[0], end="", flush=True)
        for whole, text, row in zip(printed, texts, rows, strict=True):
            print("" if is_single else whole, flush=True)
            totals.count(text, self.generator.room(row.prompt))


def continue_typed_prompts(continuation: Continuation) -> None:
    """Ask for prompts and continue each, until the input ends; an error ends one prompt alone."""
    for prompt in _ask():
        try:
            continuation.run([prompt])
        except errors.UserError as error:
            print(f"gpt3jax: error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print()  # the user has read enough of this text


def _ask() -> Iterator[str]:
    while True:
        try:
            prompt = input("prompt> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if prompt:
            yield prompt


class _Totals:
    """Counts and times of all texts of one call."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first_seconds = 0.0
        self._n_tokens = 0
        self._n_full = 0

    def note_first_token(self) -> None:
        self._first_seconds = self._first_seconds or time.perf_counter() - self._start

    def count(self, text: generated_text.GeneratedText, room: int) -> None:
        n_tokens = len(text.tokens)
        self._n_tokens += n_tokens
        self._n_full += text.reason == "length" and n_tokens == room

    def report(self, seq_len: int) -> None:
        seconds, n_tokens = time.perf_counter() - self._start, self._n_tokens
        speed = f"{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.1f} tokens/s"
        print(f"[{speed}, the first after {self._first_seconds:.1f} s]", file=sys.stderr)
        if self._n_full:
            print(
                f"[{self._n_full} stopped where the context of {seq_len} tokens was full]",
                file=sys.stderr,
            )
