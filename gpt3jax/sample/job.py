"""What a request of either schema comes to: rows to generate; how its fields are read.

Whatever a client sends becomes a job or a `RefusedError` that says what to change.
"""

import dataclasses
import json
import uuid
from typing import Any

from gpt3jax import errors
from gpt3jax.data import tokenizer
from gpt3jax.sample import batcher, generate, row_text, text_options

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


class RefusedError(Exception):
    """What becomes an answer with an error status.

    Attributes:
        field: the field at fault, "" for none.
        status: of HTTP.
        code: OpenAI's word for it, "" for none.
    """

    def __init__(self, message: str, field: str = "", status: int = 400, code: str = ""):
        super().__init__(message)
        self.field, self.status, self.code = field, status, code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for, and how many may wait."""

    max_rows: int = 8
    max_queue: int = 32
    max_body_bytes: int = 1_000_000
    max_stops: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """The model that answers, its tokenizer and its name."""

    generator: generate.Generator
    text: tokenizer.Tokenizer
    name: str
    limits: Limits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """The beginning of a row."""

    text: str
    ids: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Rows to generate, and how they are told.

    Attributes:
        prompts: one of each row.
        n: rows of each prompt, one after another.
        n_likeliest: tokens whose log-probabilities are told beside each token's; -1: none at all.
    """

    prompts: list[Prompt]
    options: text_options.Options
    stops: tuple[str, ...] = ()
    echo: bool = False
    n: int = 1
    stream: bool = False
    usage_in_stream: bool = False
    n_likeliest: int = -1

    @property
    def scored(self) -> bool:
        """Whether the log-probabilities of tokens are asked for."""
        return self.n_likeliest >= 0


class Rows:
    """The rows of a job as they grow.

    Attributes:
        texts: each row's text, tokens and end.
        scores: those of its tokens, if they are asked for.
        prompt_scores: those of its prompt's tokens, if they are.
    """

    def __init__(self, served: Served, job: Job):
        """Begin behind the prompts."""
        options = job.options
        self.texts = [
            row_text.RowText(
                served.text,
                prompt.ids,
                served.generator.limit(prompt.ids, options),
                job.stops,
                options.ignore_eod,
            )
            for prompt in job.prompts
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


def parse(content: bytes, known: set[str]) -> dict[str, Any]:
    """Return the fields of a body that are not null.

    Raises:
        RefusedError: it is no JSON object of known fields.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the request is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RefusedError("the request must be a JSON object")
    unknown = sorted(body.keys() - known)
    if unknown:
        name = ascii(unknown[0])[1:-1]
        raise RefusedError(f"{name} is not supported: leave it out", name)
    return {name: value for name, value in body.items() if value is not None}


def field(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """Return a field of this kind, or the default where it is absent.

    Raises:
        RefusedError: it is of another kind.
    """
    value = body.get(name, default)
    right = type(value) is kind or (kind is float and type(value) is int)
    if name in body and not right:
        raise RefusedError(f"{name} must be {_WORDS[kind]}", name)
    return value


def integer(body: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    """Return an integer of this range, or the default where it is absent.

    Raises:
        RefusedError: it is another value.
    """
    value: int = field(body, name, int, default)
    if not least <= value <= most:
        raise RefusedError(f"{name}={value} must be at least {least} and at most {most}", name)
    return value


def seed(body: dict[str, Any], name: str) -> int:
    """Return the seed of 32 bits that stands for any integer; a random one where it is absent.

    Raises:
        RefusedError: it is no integer.
    """
    return int(field(body, name, int, uuid.uuid4().int)) % 2**32


def check_option(name: str, value: Any) -> Any:
    """Return a value of `text_options.Options`.

    Raises:
        RefusedError: it is out of range.
    """
    try:
        text_options.Options(**{name: value}).check()
    except errors.UserError as error:
        raise RefusedError(str(error), name) from None
    return value


def check_rows(served: Served, n: int, name: str) -> None:
    """Check how many rows a request asks for.

    Raises:
        RefusedError: they are too many.
    """
    if n > served.limits.max_rows:
        raise RefusedError(f"{n} texts in one request: at most {served.limits.max_rows}", name)


def read_prompt(
    served: Served,
    given: Any,
    name: str,
    options: text_options.Options,
    before: tuple[int, ...] = (),
) -> Prompt:
    """Return a text or token ids as the beginning of a row that fits the context.

    Raises:
        RefusedError: it cannot be continued by as many tokens as are asked for.
    """
    ids = [*before, *_encode(served, given, name)]
    try:
        served.generator.check(ids, options)
    except errors.UserError as error:
        raise RefusedError(str(error), name) from None
    n_new, seq_len = options.max_new_tokens, served.generator.model.seq_len
    if n_new > served.generator.room(ids):
        raise RefusedError(
            f"a prompt of {len(ids)} tokens and {n_new} more do not fit the context of {seq_len}: "
            "ask for fewer",
            name,
            code="context_length_exceeded",
        )
    if isinstance(given, str):
        return Prompt(text=given, ids=ids)
    # Half a character at the end of ids is told by what follows, if anything does.
    shown = row_text.RowText(served.text, (), len(ids) + bool(n_new), ignore_eod=True)
    return Prompt(text=shown.add(ids), ids=ids)


def _encode(served: Served, given: Any, name: str) -> list[int]:
    if isinstance(given, str):
        try:
            return served.text.encode(given) or [served.text.eod_id]
        except errors.UserError as error:  # half of a surrogate pair
            raise RefusedError(f"{name} is not text: {error}", name) from None
    if isinstance(given, list) and all(type(token) is int for token in given):
        return given
    raise RefusedError(f"{name} must be a text, token ids, or a list of either", name)
