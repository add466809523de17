"""A checkpoint as a model of lm-eval, so that its tasks run on it; the only file that imports it.

Weights are on the devices either for scoring or for generating: lm-eval asks for all of one kind,
then for all of the other.
"""

import pathlib
from typing import Any

import lm_eval
import lm_eval.tasks
import lm_eval.utils
import numpy as np
import tqdm
from lm_eval.api import registry
from lm_eval.api.model import TemplateLM

from gpt3jax import errors
from gpt3jax.checkpoint import parameters
from gpt3jax.config import schema, user_paths
from gpt3jax.data import tokenizer, tokenizer_sources
from gpt3jax.evaluate import scoring
from gpt3jax.sample import generate, row_text, text_options

_MAX_NEW_TOKENS = 256  # where a task says nothing, as lm-eval's own models do
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


@registry.register_model("gpt3jax")
class CheckpointLM(TemplateLM):
    """A checkpoint that answers lm-eval's three kinds of request."""

    def __init__(
        self,
        source: parameters.Trained,
        text: tokenizer.Tokenizer,
        batch_size: int = 8,
        stride: int = 0,
    ):
        """Use a checkpoint; `stride` is of `loglikelihood_rolling` (0: seq_len, as lm-eval)."""
        super().__init__()
        self._source, self._text, self._batch_size = source, text, batch_size
        self._seq_len = source.cfg.model.seq_len
        self._stride = stride or self._seq_len
        self._scorer: scoring.Scorer | None = None
        self._generator: generate.Generator | None = None

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "CheckpointLM":
        """Return the model of lm-eval's `model_args`, on all devices as replicas.

        They are `checkpoint`, and `compute_dtype, batch_size, stride` and the fields of
        `tokenizer_sources.Source`, as the command's options. Of lm-eval's it takes `batch_size`.

        Raises:
            UserError: the checkpoint or the tokenizer cannot be used.
        """
        given = {"batch_size": (additional_config or {}).get("batch_size") or 8, **arg_dict}
        folder = user_paths.full("checkpoint", given.pop("checkpoint"))
        dtype = given.pop("compute_dtype", "auto")
        size, stride = int(given.pop("batch_size")), int(given.pop("stride", 0))
        source = parameters.open_for_use(folder, schema.Mesh(), dtype)
        files = user_paths.expanded(tokenizer_sources.Source(**given))
        text = parameters.open_tokenizer(folder, source.cfg, files)
        return cls(source, text, size, stride)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "CheckpointLM":
        """Return the model of `model_args` as text, `checkpoint=DIR,batch_size=4`."""
        args = lm_eval.utils.simple_parse_args_string(arg_string)
        return cls.create_from_arg_obj(args, additional_config)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which also stands before a text without context."""
        return self._text.eod_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the token ids of a text; none is added."""
        return self._text.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding gives it.

        What does not fit the model's context is left out of the beginning.

        Raises:
            UserError: a continuation alone does not fit.
        """
        rows, counts = [], []
        for (_, continuation), before, after in requests:
            if len(after) > self._seq_len:
                raise errors.UserError(
                    f"a continuation of {len(after)} tokens ({continuation[:40]!r}...) does not "
                    f"fit model.seq_len={self._seq_len}: leave its task out"
                )
            rows.append(np.asarray([*before, *after][-self._seq_len - 1 :]))
            counts.append(len(after))
        sums = self._score(rows, counts, disable_tqdm)
        for (request, _, _), answer in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood", request, answer)
        return sums

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, as the command's `--text` scores it."""
        rows, counts, numbers = [], [], []
        for number, request in enumerate(requests):
            tokens = np.asarray(self._text.encode(request.args[0]), np.int32)
            cut = scoring.window_rows(tokens, self.eot_token_id, self._seq_len, self._stride)
            for row, n_counted in cut:
                rows.append(row)
                counts.append(n_counted)
                numbers.append(number)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(
            numbers, self._score(rows, counts, disable_tqdm), strict=True
        ):
            totals[number] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _score(
        self, rows: list[np.ndarray], counts: list[int], quiet: bool
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of the last tokens of each row, and whether all are greedy."""
        self._generator = None
        if self._scorer is None:
            source = self._source
            self._scorer = scoring.Scorer(
                source.params(), source.program, source.cfg.data, self._batch_size
            )
        answers = [(0.0, True)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # what is too large fails now
        with tqdm.tqdm(total=len(rows), desc="scoring", unit=" rows", disable=quiet) as bar:
            for low in range(0, len(order), self._scorer.n_rows):
                batch = order[low : low + self._scorer.n_rows]
                scored = self._scorer.score([rows[i] for i in batch])
                for i, (losses, greedy) in zip(batch, scored, strict=True):
                    n = len(losses) - counts[i]
                    answers[i] = -float(losses[n:].sum(dtype=np.float64)), bool(greedy[n:].all())
                bar.update(len(batch))
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to a stop string or the end of text.

        Where both do not fit, at most half of the model's context is generated, and what does not
        fit before it is left out of the beginning.

        Raises:
            UserError: an option of generation that is not supported.
        """
        self._scorer = None
        if self._generator is None:
            source = self._source
            self._generator = generate.Generator(
                source.params(), source.program.compute, source.program.mesh, self.eot_token_id
            )
        jobs = [self._job(*request.args) for request in requests]
        answers = [""] * len(requests)
        order = sorted(range(len(jobs)), key=lambda i: -len(jobs[i][0]))
        with tqdm.tqdm(
            total=len(jobs), desc="generating", unit=" texts", disable=disable_tqdm
        ) as bar:
            for low in range(0, len(order), self._batch_size):
                batch = order[low : low + self._batch_size]
                texts = self._generate(self._generator, [jobs[i] for i in batch], batch)
                for i, answer in zip(batch, texts, strict=True):
                    answers[i] = answer
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                bar.update(len(batch))
        return answers

    def _job(
        self, context: str, options: dict[str, Any]
    ) -> tuple[list[int], text_options.Options, tuple[str, ...]]:
        """Return the prompt, how to choose its tokens, and the stop strings."""
        unknown = sorted(options.keys() - _GENERATION)
        if unknown:
            raise errors.UserError(
                f"a task asks for {unknown[0]}={options[unknown[0]]!r} in generating, which is not "
                f"supported: leave the task out; known are {', '.join(sorted(_GENERATION))}"
            )
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else until
        prompt = self.tok_encode(context) or [self.eot_token_id]
        room = max(self._seq_len - len(prompt), self._seq_len // 2, 1)
        n_new = min(int(options.get("max_gen_toks", _MAX_NEW_TOKENS)), room)
        temperature = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
        choice = text_options.Options(
            max_new_tokens=n_new,
            temperature=temperature if options.get("do_sample", True) else 0.0,
            top_k=options.get("top_k", 0),
            top_p=options.get("top_p", 1.0),
        )
        return prompt[n_new - self._seq_len :], choice, tuple(stop for stop in stops if stop)

    def _generate(
        self,
        generator: generate.Generator,
        jobs: list[tuple[list[int], text_options.Options, tuple[str, ...]]],
        numbers: list[int],
    ) -> list[str]:
        texts = [
            row_text.RowText(self._text, prompt, generator.limit(prompt, choice), stops)
            for prompt, choice, stops in jobs
        ]
        told = [""] * len(jobs)
        stream = generator.stream([job[0] for job in jobs], [job[1] for job in jobs], numbers)
        for new in stream:
            told = [t + row.add(ids) for t, row, ids in zip(told, texts, new, strict=True)]
            if all(row.reason for row in texts):
                break
        return told


def run(
    model: CheckpointLM, tasks: list[str], folder: str, n_fewshot: int, limit: int
) -> tuple[dict[str, Any], str]:
    """Run tasks of lm-eval, and of a folder of its YAML files; return results, and a table.

    Args:
        model: what is asked.
        tasks: their names; a group's or a tag's stand for its members.
        folder: where other tasks than lm-eval's are ("": nowhere).
        n_fewshot: examples before each question (-1: as the task says).
        limit: questions of each task at most (0: all).

    Raises:
        UserError: a task is not known.
    """
    if folder and not pathlib.Path(folder).is_dir():
        raise errors.UserError(f"--task-folder={folder} is no folder: give one with YAML files")
    manager = lm_eval.tasks.TaskManager(include_path=folder or None)
    for name in tasks:
        if not manager.match_tasks([name]):
            raise errors.UserError(
                f"--tasks has {name!r}, which lm-eval does not know: see `lm-eval ls tasks`, or "
                "give the folder of its YAML file as --task-folder"
            )
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        num_fewshot=None if n_fewshot < 0 else n_fewshot,
        limit=limit or None,
        task_manager=manager,
        log_samples=False,
    )
    tables = [lm_eval.utils.make_table(results)]
    if results.get("groups"):
        tables.append(lm_eval.utils.make_table(results, "groups"))
    return dict(results), "\n".join(tables)
