"""What a request of either HTTP API asks for: rows to generate. And these rows as they grow."""

import dataclasses

from gpt3jax import errors
from gpt3jax.data import tokenizer as tokenization
from gpt3jax.sample import batcher, body_fields, generate, generated_text, sampling_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one request may ask for, and how many requests may wait."""

    max_rows: int = 8
    max_queue: int = 32
    max_body_bytes: int = 1_000_000
    max_stops: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The model that answers, its tokenizer and its name."""

    generator: generate.Generator
    tokenizer: tokenization.Tokenizer
    name: str
    limits: Limits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """The beginning of a row."""

    text: str
    ids: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Rows to generate, and how they are answered.

    Attributes:
        prompts: one for each row.
        n: rows of each prompt, one after another.
        n_likeliest: likeliest tokens whose log-probabilities stand beside each token's own; -1
            where no log-probabilities are wanted.
    """

    prompts: list[Prompt]
    options: sampling_options.Options
    stops: tuple[str, ...] = ()
    echo: bool = False
    n: int = 1
    stream: bool = False
    usage_in_stream: bool = False
    n_likeliest: int = -1

    @property
    def scored(self) -> bool:
        """Whether the log-probabilities of tokens are wanted."""
        return self.n_likeliest >= 0

    @property
    def rows(self) -> list[generate.Row]:
        """The rows to generate, numbered from 0."""
        return [
            generate.Row(prompt=prompt.ids, options=self.options, number=number)
            for number, prompt in enumerate(self.prompts)
        ]


class GrowingRows:
    """The rows of a job as they grow.

    Attributes:
        texts: each row's text, tokens and end.
        scores: of each row's new tokens, if they are wanted.
        prompt_scores: of each prompt's tokens, if they are wanted.
    """

    def __init__(self, served: ServedModel, job: Job):
        """Begin after the prompts."""
        self.texts = [
            generated_text.begin(served.generator, served.tokenizer, row, job.stops)
            for row in job.rows
        ]
        self.scores: list[list[generate.Score]] = [[] for _ in job.prompts]
        self.prompt_scores: list[list[generate.Score]] = [[] for _ in job.prompts]

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return all(text.reason for text in self.texts)

    def add(self, part: batcher.Part) -> list[str]:
        """Return what a part adds to the text of each row."""
        self.prompt_scores = part.prompt_scores or self.prompt_scores
        new = [text.add(tokens) for text, tokens in zip(self.texts, part.tokens, strict=True)]
        for text, scores, added in zip(self.texts, self.scores, part.scores, strict=True):
            scores += added[: len(text.tokens) - len(scores)]
        return new


def check_n_rows(served: ServedModel, n: int, name: str) -> None:
    """Check how many rows a request asks for.

    Raises:
        RefusedError: they are too many; the field of this name asks for them.
    """
    if n > served.limits.max_rows:
        message = f"{n} texts in one request: at most {served.limits.max_rows}"
        raise body_fields.RefusedError(message, name)


def read_prompt(
    served: ServedModel,
    value: object,
    name: str,
    options: sampling_options.Options,
    before: tuple[int, ...] = (),
) -> Prompt:
    """Return a text or token ids as the beginning of a row that fits the context.

    Args:
        served: the model.
        value: an element of the field of this name.
        name: the field.
        options: how many tokens must still fit.
        before: ids that come first.

    Raises:
        RefusedError: the prompt cannot be continued by as many tokens as are asked for.
    """
    ids = [*before, *_encode(served, value, name)]
    try:
        served.generator.check(ids, options)
    except errors.UserError as error:
        raise body_fields.RefusedError(error.message, name) from None
    n_new, seq_len = options.max_new_tokens, served.generator.model.seq_len
    if n_new > served.generator.room(ids):
        raise body_fields.RefusedError(
            f"a prompt of {len(ids)} tokens and {n_new} more do not fit the context of {seq_len}: "
            "ask for fewer",
            name,
            code="context_length_exceeded",
        )
    if isinstance(value, str):
        return Prompt(text=value, ids=ids)
    # Half a character at the end of the ids waits for the new tokens, if there are to be any.
    limit = len(ids) + bool(n_new)
    text = generated_text.GeneratedText(served.tokenizer, (), limit, ignore_eod=True)
    return Prompt(text=text.add(ids), ids=ids)


def _encode(served: ServedModel, value: object, name: str) -> list[int]:
    if isinstance(value, str):
        try:
            return served.tokenizer.encode(value) or [served.tokenizer.eod_id]
        except errors.UserError as error:  # half of a surrogate pair
            raise body_fields.RefusedError(f"{name} is not text: {error.message}", name) from None
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    message = f"{name} must be a text, token ids, or a list of either"
    raise body_fields.RefusedError(message, name)
