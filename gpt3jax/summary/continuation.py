"""A text that the model writes after a line of the corpus, and how probable it finds it."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from gpt3jax import errors
from gpt3jax.data import tokenizer as tokenization
from gpt3jax.sample import __main__ as sample
from gpt3jax.sample import generate, generated_text, sampling_options
from gpt3jax.sample import options as sample_options
from gpt3jax.summary import options as summary_options
from gpt3jax.summary import recorded_run

SAMPLING = sampling_options.Options(max_new_tokens=32, temperature=0.7)
_PROMPT_TOKENS = range(4, 17)
_WORD = re.compile(r"[^\W\d_]{3,}")  # in what stands between blanks
_CANDIDATES = 16  # lines, of which one is the prompt
ROWS = 16  # of the corpus, to look for a prompt in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """A prompt and what the model wrote after it.

    Attributes:
        tokens: the new ones, with the end-of-text token if the text has ended.
        logprobs: of these tokens under the model (ln p); temperature does not change them.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def mean_probability(self) -> float:
        """The geometric mean of the new tokens' probabilities."""
        return math.exp(math.fsum(self.logprobs) / len(self.logprobs))


def check_tokenizer(run: recorded_run.RecordedRun, options: summary_options.Options) -> None:
    """Check that a tokenizer is named.

    Raises:
        UserError: neither the options nor the run name one.
    """
    source, data = options.source, run.cfg.data
    given = source.tokenizer or source.vocab_file or source.merge_file
    if not (given or data.tokenizer or data.vocab_file):
        raise errors.UserError(
            f"{run.folder}: the run names no tokenizer (data.vocab_file, data.tokenizer), so its "
            "text cannot be shown: give --vocab-file and --merge-file, or --tokenizer",
            page="sampling.md",
        )


def write(
    run: recorded_run.RecordedRun, options: summary_options.Options, rows: np.ndarray
) -> Continuation:
    """Let the newest checkpoint continue a line of some rows of tokens, `[n, T]`.

    Raises:
        UserError: the checkpoint or the tokenizer cannot be used.
    """
    generator, tokenizer = sample.load(
        sample_options.Options(
            checkpoint=run.cfg.checkpoint.dir, source=options.source, mesh=options.mesh
        )
    )
    prompt = choose_prompt(rows, tokenizer)
    row = generate.Row(prompt=prompt, options=SAMPLING, number=0)
    text, written = generated_text.begin(generator, tokenizer, row), ""
    logprobs: list[float] = []
    for step in generator.steps([row], scored=True):
        written += text.add(step.tokens[0])
        logprobs += [score.logprob for score in step.scores[0]]
    return Continuation(
        prompt=tokenizer.decode(prompt),
        text=written,
        tokens=tuple(text.tokens),
        logprobs=tuple(logprobs),
    )


def choose_prompt(rows: np.ndarray, tokenizer: tokenization.Tokenizer) -> list[int]:
    """Return the tokens of a whole line: of the first short ones, that with the most words.

    If no line has two words, it is the beginning of the first row.
    """
    first = list(itertools.islice(_short_lines(rows, tokenizer), _CANDIDATES))
    if first:
        return max(first, key=lambda candidate: candidate[0])[1]
    beginning: Sequence[int] = rows[0, : _PROMPT_TOKENS[-1]].tolist()
    return list(beginning)


def _short_lines(
    rows: np.ndarray, tokenizer: tokenization.Tokenizer
) -> Iterator[tuple[int, list[int]]]:
    """Yield the number of words, and the tokens, of short lines of two words or more."""
    for row in rows[:ROWS]:
        for line in tokenizer.decode(row.tolist()).split("\n")[1:-1]:
            tokens = tokenizer.encode(line)
            n_words = sum(_WORD.search(word) is not None for word in line.split())
            if len(tokens) in _PROMPT_TOKENS and n_words > 1:
                yield n_words, tokens
