"""Megatron-LM's `PUT /api`: a body becomes a job, and its rows become texts and segments."""

from typing import Any

from gpt3jax.config import ranges
from gpt3jax.sample import batcher, job, text_options

FIELDS = {
    "prompts", "tokens_to_generate", "temperature", "top_k", "top_p", "add_BOS", "random_seed",
    "logprobs", "echo_prompts",
}  # fmt: skip


def read(served: job.Served, body: dict[str, Any]) -> job.Job:
    """Return the job of a body whose fields are known.

    Raises:
        RefusedError: a field's value cannot be served.
    """
    prompts = body.get("prompts")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise job.RefusedError("prompts must be a list of texts", "prompts")
    job.check_rows(served, len(prompts), "prompts")
    # Megatron's top_k=1 is its way to ask for greedy decoding, and 0 means no top_p.
    top_k = job.check_option("top_k", job.field(body, "top_k", int, 0))
    top_p = job.check_option("top_p", job.field(body, "top_p", float, 0.0) or 1.0)
    temperature = job.check_option("temperature", job.field(body, "temperature", float, 1.0))
    options = text_options.Options(
        max_new_tokens=job.integer(body, "tokens_to_generate", 64, 0, ranges.INT32),
        temperature=0.0 if top_k == 1 else temperature,
        top_k=top_k,
        top_p=top_p,
        seed=job.seed(body, "random_seed"),
    )
    first = (served.text.eod_id,) if job.field(body, "add_BOS", bool, False) else ()
    return job.Job(
        prompts=[job.read_prompt(served, p, "prompts", options, first) for p in prompts],
        options=options,
        echo=job.field(body, "echo_prompts", bool, True),
        n_likeliest=0 if job.field(body, "logprobs", bool, False) else -1,
    )


class Answer:
    """The answer to a job: each row's text, its tokens one by one, and their log-probabilities."""

    def __init__(self, served: job.Served, asked: job.Job):
        """Begin with no text."""
        self._text, self._job = served.text, asked
        self._rows = job.Rows(served, asked)
        self._told = [prompt.text if asked.echo else "" for prompt in asked.prompts]
        self._begun = False

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return self._begun and self._rows.done

    def add(self, part: batcher.Part) -> None:
        """Take a part in."""
        self._begun = True
        new = self._rows.add(part)
        self._told = [told + text for told, text in zip(self._told, new, strict=True)]

    def whole(self) -> dict[str, Any]:
        """Return what is told; the log-probabilities begin with the second token of the prompt."""
        rows = zip(self._job.prompts, self._rows.texts, strict=True)
        scores = zip(self._rows.prompt_scores, self._rows.scores, strict=True)
        logprobs = [[score.logprob for score in (*a, *b)] for a, b in scores]
        return {
            "text": self._told,
            "segments": [self._segments([*prompt.ids, *text.tokens]) for prompt, text in rows],
            "logprobs": logprobs if self._job.scored else None,
        }

    def _segments(self, ids: list[int]) -> list[str]:
        return [self._text.decode(ids[:1]), *(self._text.token_text(token) for token in ids[1:])]
