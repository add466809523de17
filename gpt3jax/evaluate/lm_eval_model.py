"""A checkpoint as a model of lm-eval, so that its tasks run on it; the only file that imports it.

Weights are on the devices either for scoring or for generating: lm-eval asks for all of one kind,
then for all of the other.
"""

import dataclasses
import pathlib
from typing import Any, TypeAlias

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
from gpt3jax.data import tokenizer as tokenization
from gpt3jax.data import tokenizer_sources
from gpt3jax.evaluate import token_losses, windows
from gpt3jax.sample import generate, generated_text, sampling_options

_PAGE = "evaluation.md#tasks"
_MAX_NEW_TOKENS = 256  # where a task does not say, as in lm-eval's own models
_GENERATION_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}

Json: TypeAlias = Any  # values of a task's YAML file or of `model_args`
Instance: TypeAlias = Any  # `lm_eval.api.instance.Instance`: the library has no types


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GenerationRequest:
    """A row to generate, and the strings that end its text."""

    row: generate.Row
    stops: tuple[str, ...]


@registry.register_model("gpt3jax")
class CheckpointLM(TemplateLM):
    """A checkpoint that answers lm-eval's three kinds of request."""

    def __init__(
        self,
        source: parameters.Trained,
        tokenizer: tokenization.Tokenizer,
        batch_size: int = 8,
        stride: int = 0,
    ):
        """Use a checkpoint; `loglikelihood_rolling` has this stride (0: seq_len, as lm-eval)."""
        super().__init__()
        self._source, self._tokenizer, self._batch_size = source, tokenizer, batch_size
        self._seq_len = source.cfg.model.seq_len
        self._stride = stride or self._seq_len
        self._scorer: token_losses.Scorer | None = None
        self._generator: generate.Generator | None = None

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Json], additional_config: dict[str, Json] | None = None
    ) -> "CheckpointLM":
        """Return the model of lm-eval's `model_args`, on all devices as replicas.

        They are `checkpoint`, and `compute_dtype, batch_size, stride` and the fields of
        `tokenizer_sources.Source`, as the command's options. lm-eval's own `batch_size` counts too.

        Raises:
            UserError: the checkpoint or the tokenizer cannot be used.
        """
        args = {"batch_size": (additional_config or {}).get("batch_size") or 8, **arg_dict}
        folder = user_paths.full("checkpoint", args.pop("checkpoint"))
        dtype = args.pop("compute_dtype", "auto")
        size, stride = int(args.pop("batch_size")), int(args.pop("stride", 0))
        source = parameters.open_for_use(folder, schema.Mesh(), dtype)
        files = user_paths.expanded(tokenizer_sources.Source(**args))
        tokenizer = parameters.open_tokenizer(folder, source.cfg, files)
        return cls(source, tokenizer, size, stride)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Json] | None = None
    ) -> "CheckpointLM":
        """Return the model of `model_args` as text, `checkpoint=DIR,batch_size=4`."""
        args = lm_eval.utils.simple_parse_args_string(arg_string)
        return cls.create_from_arg_obj(args, additional_config)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which also stands before a text without context."""
        return self._tokenizer.eod_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding gives it.

        Where a row does not fit the model's context, its beginning is left out.

        Raises:
            UserError: a continuation alone does not fit.
        """
        rows, counts = [], []
        for (_, continuation), before, after in requests:
            if len(after) > self._seq_len:
                raise errors.UserError(
                    f"a continuation of {len(after)} tokens ({continuation[:40]!r}...) does not "
                    f"fit model.seq_len={self._seq_len}: leave its task out",
                    page=_PAGE,
                )
            rows.append(np.asarray([*before, *after][-self._seq_len - 1 :]))
            counts.append(len(after))
        sums = self._score(rows, counts, quiet=disable_tqdm)
        for (request, _, _), answer in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood", request, answer)
        return sums

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text, as the command's `--text` scores it."""
        rows, counts, numbers = [], [], []
        for number, request in enumerate(requests):
            tokens = np.asarray(self._tokenizer.encode(request.args[0]), np.int32)
            text_rows = windows.window_rows(tokens, self.eot_token_id, self._seq_len, self._stride)
            for row, n_counted in text_rows:
                rows.append(row)
                counts.append(n_counted)
                numbers.append(number)
        totals = [0.0] * len(requests)
        sums = self._score(rows, counts, quiet=disable_tqdm)
        for number, (total, _) in zip(numbers, sums, strict=True):
            totals[number] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _score(
        self, rows: list[np.ndarray], counts: list[int], *, quiet: bool
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each row's last tokens, and whether all are the likeliest.

        `counts` says how many of each row's tokens these are.
        """
        self._generator = None
        if self._scorer is None:
            source = self._source
            self._scorer = token_losses.Scorer(
                source.params(), source.program, source.cfg.data, self._batch_size
            )
        answers = [(0.0, True)] * len(rows)
        # The longest first, so that a batch that is too large fails at the start.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        with tqdm.tqdm(total=len(rows), desc="scoring", unit=" rows", disable=quiet) as bar:
            for low in range(0, len(order), self._scorer.n_rows):
                batch = order[low : low + self._scorer.n_rows]
                scored = self._scorer.score([rows[i] for i in batch])
                for i, (losses, is_likeliest) in zip(batch, scored, strict=True):
                    n = len(losses) - counts[i]
                    total = -float(losses[n:].sum(dtype=np.float64))
                    answers[i] = total, bool(is_likeliest[n:].all())
                bar.update(len(batch))
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to a stop string or the end of text.

        Where both do not fit, at most half of the model's context is generated, and the beginning
        of the context is left out.

        Raises:
            UserError: an option of generation is not supported.
        """
        self._scorer = None
        if self._generator is None:
            source = self._source
            self._generator = generate.Generator(
                source.params(), source.program.compute, source.program.mesh, self.eot_token_id
            )
        to_generate = [
            self._generation_request(number, *request.args)
            for number, request in enumerate(requests)
        ]
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(to_generate[i].row.prompt))
        with tqdm.tqdm(
            total=len(requests), desc="generating", unit=" texts", disable=disable_tqdm
        ) as bar:
            for low in range(0, len(order), self._batch_size):
                batch = order[low : low + self._batch_size]
                texts = self._generate(self._generator, [to_generate[i] for i in batch])
                for i, answer in zip(batch, texts, strict=True):
                    answers[i] = answer
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                bar.update(len(batch))
        return answers

    def _generation_request(
        self, number: int, context: str, options: dict[str, Json]
    ) -> _GenerationRequest:
        """Return the row of a context and of the options that a task gives for generation."""
        unknown = sorted(options.keys() - _GENERATION_OPTIONS)
        if unknown:
            raise errors.UserError(
                f"a task asks for {unknown[0]}={options[unknown[0]]!r} in generating, which is not "
                "supported: leave the task out; supported are "
                f"{', '.join(sorted(_GENERATION_OPTIONS))}",
                page=_PAGE,
            )
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else until
        prompt = self.tok_encode(context) or [self.eot_token_id]
        room = max(self._seq_len - len(prompt), self._seq_len // 2, 1)
        n_new = min(int(options.get("max_gen_toks", _MAX_NEW_TOKENS)), room)
        temperature = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
        sampling = sampling_options.Options(
            max_new_tokens=n_new,
            temperature=temperature if options.get("do_sample", True) else 0.0,
            top_k=options.get("top_k", 0),
            top_p=options.get("top_p", 1.0),
        )
        return _GenerationRequest(
            row=generate.Row(
                prompt=prompt[n_new - self._seq_len :], options=sampling, number=number
            ),
            stops=tuple(stop for stop in stops if stop),
        )

    def _generate(
        self, generator: generate.Generator, batch: list[_GenerationRequest]
    ) -> list[str]:
        """Return the text of each row of one batch."""
        growing = [
            generated_text.begin(generator, self._tokenizer, request.row, request.stops)
            for request in batch
        ]
        texts = [""] * len(batch)
        for new in generator.stream([request.row for request in batch]):
            added = [text.add(ids) for text, ids in zip(growing, new, strict=True)]
            texts = [text + more for text, more in zip(texts, added, strict=True)]
            if all(text.reason for text in growing):
                break
        return texts


def run(
    model: CheckpointLM, tasks: list[str], folder: str, n_fewshot: int, limit: int
) -> tuple[dict[str, object], str]:
    """Run tasks of lm-eval, and of a folder of its YAML files; return results, and a table.

    Args:
        model: the model that answers.
        tasks: their names; the name of a group or a tag stands for its members.
        folder: a folder with more tasks ("": none).
        n_fewshot: examples before each question (-1: as the task says).
        limit: at most this many questions of each task (0: all).

    Raises:
        UserError: a task is not known, or the folder does not exist.
    """
    if folder and not pathlib.Path(folder).is_dir():
        raise errors.UserError(
            f"--task-folder={folder} is no folder: give one with YAML files", page=_PAGE
        )
    manager = lm_eval.tasks.TaskManager(include_path=folder or None)
    for name in tasks:
        if not manager.match_tasks([name]):
            raise errors.UserError(
                f"--tasks has {name!r}, which lm-eval does not know: see `lm-eval ls tasks`, or "
                "give the folder of its YAML file as --task-folder",
                page=_PAGE,
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
