"""OpenAI's completions: a body becomes a job, and the parts of its rows become choices."""

import dataclasses
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TypedDict

from gpt3jax.config import ranges
from gpt3jax.sample import (
    batcher,
    body_fields,
    generate,
    generated_text,
    generation_job,
    sampling,
    sampling_options,
)

# Fields that change nothing at these values, which clients send; other values are refused.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "suffix": ("",),
}  # fmt: skip
FIELDS = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "best_of", "stop",
    "seed", "echo", "logprobs", "stream", "stream_options", "user", "ignore_eos", *_NEUTRAL,
}  # fmt: skip


class Choice(TypedDict):
    """What is added to one row, or all of it."""

    index: int
    text: str
    logprobs: dict[str, list[object]] | None
    finish_reason: str | None


def read(served: generation_job.ServedModel, body: body_fields.JsonObject) -> generation_job.Job:
    """Return the job of a body whose fields are known.

    Raises:
        RefusedError: a field has a value that is not supported.
    """
    _check_neutral(served, body)
    n = body_fields.read_integer(body, "n", 1, range(1, served.limits.max_rows + 1))
    if body_fields.read(body, "best_of", int, n) != n:
        raise body_fields.RefusedError(f"best_of must be n={n}: leave it out", "best_of")
    stream = body_fields.read(body, "stream", bool, False)
    options = sampling_options.Options(
        max_new_tokens=body_fields.read_integer(body, "max_tokens", 16, range(ranges.INT32 + 1)),
        temperature=body_fields.read_option(body, "temperature", float, 1.0),
        top_k=body_fields.read_option(body, "top_k", int, 0),
        top_p=body_fields.read_option(body, "top_p", float, 1.0),
        seed=body_fields.read_seed(body, "seed"),
        ignore_eod=body_fields.read(body, "ignore_eos", bool, False),
    )
    return generation_job.Job(
        prompts=_prompts(served, body, n, options),
        options=options,
        stops=_stops(body, served.limits.max_stops),
        echo=body_fields.read(body, "echo", bool, False),
        n=n,
        stream=stream,
        usage_in_stream=_usage_in_stream(body, stream),
        n_likeliest=_n_likeliest(body),
    )


def unknown_model(served: generation_job.ServedModel) -> body_fields.RefusedError:
    """Return the error for a request that names another model."""
    message = f"model must be {served.name!r}, the model that is served"
    return body_fields.RefusedError(message, "model", status=404, code="model_not_found")


class Completion:
    """The answer to a job, whole or as a stream of choices."""

    def __init__(self, served: generation_job.ServedModel, job: generation_job.Job):
        """Begin with no text."""
        self._served, self._job = served, job
        self._rows = generation_job.GrowingRows(served, job)
        self._begun = False
        self._choices: list[Choice] = []
        self._token_names: dict[int, str] = {}
        self.head: body_fields.JsonObject = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return self._begun and self._rows.done

    def add(self, part: batcher.Part) -> list[Choice]:
        """Return the choices that a part adds to, at most one for each row."""
        if not self._begun:  # the first part is about the prompts alone
            self._begun = True
            self._rows.add(part)
            additions = self._prompt_additions()
        else:
            additions = self._token_additions(part)
        choices = [self._choice(addition) for addition in additions]
        self._choices += choices
        return choices

    def whole(self) -> body_fields.JsonObject:
        """Return the answer that has all choices of a row in one."""
        merged: dict[int, Choice] = {}
        for choice in self._choices:
            row = merged.setdefault(choice["index"], choice)
            if row is not choice:
                row["text"] += choice["text"]
                row["finish_reason"] = choice["finish_reason"]
                added = choice["logprobs"] or {}
                for name, values in (row["logprobs"] or {}).items():
                    values += added[name]
        return self.head | {"choices": [merged[i] for i in sorted(merged)], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Return the counts of tokens so far."""
        n_prompt = sum(len(prompt.ids) for prompt in self._job.prompts[:: self._job.n])
        n_new = sum(len(text.tokens) for text in self._rows.texts)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
        }

    def _prompt_additions(self) -> "Iterator[_Addition]":
        for i, prompt in enumerate(self._job.prompts):
            reason = self._rows.texts[i].reason
            if self._job.echo:
                tokenizer, scored = self._served.tokenizer, self._job.scored
                yield _Addition(
                    row=i,
                    text=prompt.text,
                    tokens=prompt.ids,
                    offsets=generated_text.offsets(tokenizer, prompt.ids) if scored else [],
                    scores=[None, *self._rows.prompt_scores[i]],  # nothing precedes the first
                    reason=reason,
                )
            elif reason:
                yield _Addition(row=i, reason=reason)

    def _token_additions(self, part: batcher.Part) -> "Iterator[_Addition]":
        before = [(len(text.tokens), text.reason) for text in self._rows.texts]
        new = self._rows.add(part)
        for i, (n, ended) in enumerate(before):
            text, scores = self._rows.texts[i], self._rows.scores[i][n:]
            if not ended and (new[i] or text.reason or (self._job.scored and scores)):
                n_echoed = len(self._job.prompts[i].text) if self._job.echo else 0
                yield _Addition(
                    row=i,
                    text=new[i],
                    tokens=text.tokens[n:],
                    offsets=[n_echoed + offset for offset in text.offsets[n:]],
                    scores=scores,
                    reason=text.reason,
                )

    def _choice(self, addition: "_Addition") -> Choice:
        tokens, scores = addition.tokens, addition.scores
        logprobs: dict[str, list[object]] | None = None
        if self._job.scored:
            logprobs = {
                "tokens": [self._token_name(token) for token in tokens],
                "token_logprobs": [score and score.logprob for score in scores],
                "top_logprobs": [
                    score and self._top_logprobs(token, score)
                    for token, score in zip(tokens, scores, strict=True)
                ],
                "text_offset": [*addition.offsets],
            }
        return {
            "index": addition.row,
            "text": addition.text,
            "logprobs": logprobs,
            "finish_reason": addition.reason or None,
        }

    def _top_logprobs(self, token: int, score: generate.Score) -> dict[str, float]:
        """Return the log-probabilities of the likeliest tokens, and of the token itself."""
        likeliest = score.likeliest[: self._job.n_likeliest]
        return {self._token_name(i): logprob for i, logprob in (*likeliest, (token, score.logprob))}

    def _token_name(self, token: int) -> str:
        """Return a token's text; `token_id:N` where it has none of its own, as half a character."""
        if token not in self._token_names:
            text = self._served.tokenizer.token_text(token)
            has_text = text and "\ufffd" not in text
            self._token_names[token] = text if has_text else f"token_id:{token}"
        return self._token_names[token]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Addition:
    """What is added to one row: text, and its tokens with their offsets and scores."""

    row: int
    text: str = ""
    tokens: Sequence[int] = ()
    offsets: Sequence[int] = ()
    scores: Sequence[generate.Score | None] = ()
    reason: str = ""


def _check_neutral(served: generation_job.ServedModel, body: body_fields.JsonObject) -> None:
    for name, values in _NEUTRAL.items():
        if name in body and (isinstance(body[name], bool) or body[name] not in values):
            raise body_fields.RefusedError(f"{name} is not supported: leave it out", name)
    body_fields.read(body, "user", str, "")
    if body_fields.read(body, "model", str, served.name) != served.name:
        raise unknown_model(served)


def _prompts(
    served: generation_job.ServedModel,
    body: body_fields.JsonObject,
    n: int,
    options: sampling_options.Options,
) -> list[generation_job.Prompt]:
    value = body.get("prompt", "")
    prompts = value if isinstance(value, list) and value else [value]
    if all(type(token) is int for token in prompts):
        prompts = [prompts]
    generation_job.check_n_rows(served, len(prompts) * n, "prompt")
    read = [generation_job.read_prompt(served, prompt, "prompt", options) for prompt in prompts]
    return [prompt for prompt in read for _ in range(n)]


def _stops(body: body_fields.JsonObject, most: int) -> tuple[str, ...]:
    stops = body.get("stop", [])
    if isinstance(stops, str):
        stops = [stops] if stops else []
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        message = "stop must be a text, or a list of texts that are not empty"
        raise body_fields.RefusedError(message, "stop")
    if len(stops) > most:
        raise body_fields.RefusedError(f"stop has {len(stops)} texts: at most {most}", "stop")
    return tuple(stops)


def _usage_in_stream(body: body_fields.JsonObject, stream: bool) -> bool:
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise body_fields.RefusedError("stream_options must be an object", "stream_options")
    unknown = options.keys() - {"include_usage"}
    if unknown or (options and not stream):
        message = "stream_options has include_usage alone, and needs stream=true"
        raise body_fields.RefusedError(message, "stream_options")
    return body_fields.read(options, "include_usage", bool, False)


def _n_likeliest(body: body_fields.JsonObject) -> int:
    if body.get("logprobs", False) is False:
        return -1
    return body_fields.read_integer(body, "logprobs", 0, range(sampling.N_LIKELIEST + 1))
