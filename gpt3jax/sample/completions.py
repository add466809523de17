"""OpenAI's completions: a body becomes a job, and the parts of its rows become choices."""

import time
import uuid
from collections.abc import Iterator
from typing import Any

from gpt3jax.config import ranges
from gpt3jax.sample import batcher, generate, job, row_text, sampling, text_options

# Fields that change nothing at these values, which clients send; at others they are refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "suffix": ("",),
}  # fmt: skip
FIELDS = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "best_of", "stop",
    "seed", "echo", "logprobs", "stream", "stream_options", "user", "ignore_eos", *_NEUTRAL,
}  # fmt: skip


def read(served: job.Served, body: dict[str, Any]) -> job.Job:
    """Return the job of a body whose fields are known.

    Raises:
        RefusedError: a field's value cannot be served.
    """
    _check_neutral(served, body)
    n = job.integer(body, "n", 1, 1, served.limits.max_rows)
    if job.field(body, "best_of", int, n) != n:
        raise job.RefusedError(f"best_of must be n={n}: leave it out", "best_of")
    stream = job.field(body, "stream", bool, False)
    options = text_options.Options(
        max_new_tokens=job.integer(body, "max_tokens", 16, 0, ranges.INT32),
        temperature=job.check_option("temperature", job.field(body, "temperature", float, 1.0)),
        top_k=job.check_option("top_k", job.field(body, "top_k", int, 0)),
        top_p=job.check_option("top_p", job.field(body, "top_p", float, 1.0)),
        seed=job.seed(body, "seed"),
        ignore_eod=job.field(body, "ignore_eos", bool, False),
    )
    return job.Job(
        prompts=_prompts(served, body, n, options),
        options=options,
        stops=_stops(body, served.limits.max_stops),
        echo=job.field(body, "echo", bool, False),
        n=n,
        stream=stream,
        usage_in_stream=_usage_in_stream(body, stream),
        n_likeliest=_n_likeliest(body),
    )


def _check_neutral(served: job.Served, body: dict[str, Any]) -> None:
    for name, values in _NEUTRAL.items():
        if name in body and (isinstance(body[name], bool) or body[name] not in values):
            raise job.RefusedError(f"{name} is not supported: leave it out", name)
    job.field(body, "user", str, "")
    if job.field(body, "model", str, served.name) != served.name:
        raise unknown_model(served)


def unknown_model(served: job.Served) -> job.RefusedError:
    """Return what is told where another model is asked for."""
    message = f"model must be {served.name!r}, the one that is served"
    return job.RefusedError(message, "model", status=404, code="model_not_found")


def _prompts(
    served: job.Served, body: dict[str, Any], n: int, options: text_options.Options
) -> list[job.Prompt]:
    given = body.get("prompt", "")
    prompts = given if isinstance(given, list) and given else [given]
    if all(type(token) is int for token in prompts):
        prompts = [prompts]
    job.check_rows(served, len(prompts) * n, "prompt")
    read = [job.read_prompt(served, prompt, "prompt", options) for prompt in prompts]
    return [prompt for prompt in read for _ in range(n)]


def _stops(body: dict[str, Any], most: int) -> tuple[str, ...]:
    stops = body.get("stop", [])
    if isinstance(stops, str):
        stops = [stops] if stops else []
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise job.RefusedError("stop must be a text, or a list of texts that are not empty", "stop")
    if len(stops) > most:
        raise job.RefusedError(f"stop has {len(stops)} texts: at most {most}", "stop")
    return tuple(stops)


def _usage_in_stream(body: dict[str, Any], stream: bool) -> bool:
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise job.RefusedError("stream_options must be an object", "stream_options")
    unknown = options.keys() - {"include_usage"}
    if unknown or (options and not stream):
        raise job.RefusedError(
            "stream_options takes include_usage alone, with stream=true", "stream_options"
        )
    return bool(job.field(options, "include_usage", bool, False))


def _n_likeliest(body: dict[str, Any]) -> int:
    if body.get("logprobs", False) is False:
        return -1
    return job.integer(body, "logprobs", 0, 0, sampling.N_LIKELIEST)


class Completion:
    """The answer to a job, whole or as a stream of choices."""

    def __init__(self, served: job.Served, asked: job.Job):
        """Begin with no text."""
        self._served, self._job = served, asked
        self._rows = job.Rows(served, asked)
        self._begun = False
        self._choices: list[dict[str, Any]] = []
        self._names: dict[int, str] = {}
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return self._begun and self._rows.done

    def add(self, part: batcher.Part) -> list[dict[str, Any]]:
        """Return the choices, one of a row at most, that a part adds to."""
        if not self._begun:  # the first part tells of the prompts alone
            self._begun = True
            self._rows.add(part)
            choices = list(self._beginnings())
        else:
            choices = list(self._additions(part))
        self._choices += choices
        return choices

    def whole(self) -> dict[str, Any]:
        """Return the answer that has all choices of a row in one."""
        merged: dict[int, dict[str, Any]] = {}
        for choice in self._choices:
            row = merged.setdefault(choice["index"], choice)
            if row is not choice:
                row["text"] += choice["text"]
                row["finish_reason"] = choice["finish_reason"]
                for name, values in (row["logprobs"] or {}).items():
                    values += choice["logprobs"][name]
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

    def _beginnings(self) -> Iterator[dict[str, Any]]:
        for i, prompt in enumerate(self._job.prompts):
            reason = self._rows.texts[i].reason
            if self._job.echo:
                scores = [None, *self._rows.prompt_scores[i]]  # nothing is before the first
                offsets = (
                    row_text.offsets(self._served.text, prompt.ids) if self._job.scored else []
                )
                yield self._choice(i, prompt.text, prompt.ids, offsets, scores, reason)
            elif reason:
                yield self._choice(i, "", [], [], [], reason)

    def _additions(self, part: batcher.Part) -> Iterator[dict[str, Any]]:
        before = [(len(text.tokens), text.reason) for text in self._rows.texts]
        new = self._rows.add(part)
        for i, (n, ended) in enumerate(before):
            text, scores = self._rows.texts[i], self._rows.scores[i][n:]
            if not ended and (new[i] or text.reason or (self._job.scored and scores)):
                n_echoed = len(self._job.prompts[i].text) if self._job.echo else 0
                offsets = [n_echoed + offset for offset in text.offsets[n:]]
                yield self._choice(i, new[i], text.tokens[n:], offsets, scores, text.reason)

    def _choice(
        self,
        index: int,
        text: str,
        tokens: list[int],
        offsets: list[int],
        scores: list[Any],
        reason: str,
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason or None}
        if self._job.scored:
            choice["logprobs"] = {
                "tokens": [self._name(token) for token in tokens],
                "token_logprobs": [score and score.logprob for score in scores],
                "top_logprobs": [
                    score and self._likeliest(token, score)
                    for token, score in zip(tokens, scores, strict=True)
                ],
                "text_offset": offsets,
            }
        return choice

    def _likeliest(self, token: int, score: generate.Score) -> dict[str, float]:
        """Return the log-probabilities of the likeliest tokens, and of the token itself."""
        told = score.likeliest[: self._job.n_likeliest]
        return {self._name(i): logprob for i, logprob in (*told, (token, score.logprob))}

    def _name(self, token: int) -> str:
        """Return a token's text; `token_id:N` where it has none of its own, as half a character."""
        if token not in self._names:
            text = self._served.text.token_text(token)
            self._names[token] = text if text and "\ufffd" not in text else f"token_id:{token}"
        return self._names[token]
