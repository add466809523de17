"""Megatron-LM's `PUT /api`: a body becomes a job, and its rows become texts and segments."""

from gpt3jax.config import ranges
from gpt3jax.sample import batcher, body_fields, generation_job, sampling_options

FIELDS = {
    "prompts", "tokens_to_generate", "temperature", "top_k", "top_p", "add_BOS", "random_seed",
    "logprobs", "echo_prompts",
}  # fmt: skip


def read(served: generation_job.ServedModel, body: body_fields.JsonObject) -> generation_job.Job:
    """Return the job of a body whose fields are known.

    Raises:
        RefusedError: a field has a value that is not supported.
    """
    prompts = body.get("prompts")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise body_fields.RefusedError("prompts must be a list of texts", "prompts")
    generation_job.check_n_rows(served, len(prompts), "prompts")
    # Megatron's clients ask for greedy decoding with top_k=1, and switch top-p off with 0.
    top_k = body_fields.read_option(body, "top_k", int, 0)
    top_p = body_fields.read(body, "top_p", float, 0.0) or 1.0
    body_fields.check_option("top_p", top_p)
    temperature = body_fields.read_option(body, "temperature", float, 1.0)
    n_new = body_fields.read_integer(body, "tokens_to_generate", 64, range(ranges.INT32 + 1))
    options = sampling_options.Options(
        max_new_tokens=n_new,
        temperature=0.0 if top_k == 1 else temperature,
        top_k=top_k,
        top_p=top_p,
        seed=body_fields.read_seed(body, "random_seed"),
    )
    before = (served.tokenizer.eod_id,) if body_fields.read(body, "add_BOS", bool, False) else ()
    return generation_job.Job(
        prompts=[
            generation_job.read_prompt(served, prompt, "prompts", options, before)
            for prompt in prompts
        ],
        options=options,
        echo=body_fields.read(body, "echo_prompts", bool, True),
        n_likeliest=0 if body_fields.read(body, "logprobs", bool, False) else -1,
    )


class Answer:
    """The answer to a job: each row's text, the text of each token, and their log-probabilities."""

    def __init__(self, served: generation_job.ServedModel, job: generation_job.Job):
        """Begin with no text."""
        self._tokenizer, self._job = served.tokenizer, job
        self._rows = generation_job.GrowingRows(served, job)
        self._texts = [prompt.text if job.echo else "" for prompt in job.prompts]
        self._begun = False

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return self._begun and self._rows.done

    def add(self, part: batcher.Part) -> None:
        """Add a part to the answer."""
        self._begun = True
        new = self._rows.add(part)
        self._texts = [text + added for text, added in zip(self._texts, new, strict=True)]

    def whole(self) -> body_fields.JsonObject:
        """Return the answer; its log-probabilities begin with the prompt's second token."""
        rows = zip(self._job.prompts, self._rows.texts, strict=True)
        scores = zip(self._rows.prompt_scores, self._rows.scores, strict=True)
        logprobs = [[score.logprob for score in (*a, *b)] for a, b in scores]
        return {
            "text": self._texts,
            "segments": [self._segments([*prompt.ids, *text.tokens]) for prompt, text in rows],
            "logprobs": logprobs if self._job.scored else None,
        }

    def _segments(self, ids: list[int]) -> list[str]:
        first = self._tokenizer.decode(ids[:1])
        return [first, *(self._tokenizer.token_text(token) for token in ids[1:])]
