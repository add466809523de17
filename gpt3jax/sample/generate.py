"""Generation for batches of rows on one mesh: pads prompts, runs the programs, yields tokens.

Batch size, prompt length and cache are rounded up (`bucket`), so programs are compiled for few
shapes.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from gpt3jax import errors
from gpt3jax.model import gpt
from gpt3jax.sample import decoder_weights, decoding, sampling, sampling_options
from gpt3jax.sharding import rules

_PAGE = "sampling.md"
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One text to generate.

    Attributes:
        prompt: token ids.
        number: of the row among those of its request; rows of one seed differ by it.
    """

    prompt: list[int]
    options: sampling_options.Options
    number: int


class Score(NamedTuple):
    """A token's log-probability under the model; the likeliest tokens there, and theirs."""

    logprob: float
    likeliest: tuple[tuple[int, float], ...]


class Step(NamedTuple):
    """The new tokens of each row, and the scores of these tokens if they are wanted."""

    tokens: list[list[int]]
    scores: list[list[Score]]


class Generator:
    """One model on one mesh.

    Attributes:
        model: the network's config.
        eod_id: the end-of-text token.
        weights: the model's weights as decoding reads them.
        prefill: the jitted `decoding.prefill`.
        decode: the jitted `decoding.decode`.
    """

    def __init__(self, params: gpt.GPT, compute: gpt.Compute, mesh: jax.sharding.Mesh, eod_id: int):
        """Take the parameters over: the blocks' own arrays are freed."""
        self.model, self.eod_id, self._mesh = params.model, eod_id, mesh
        with jax.set_mesh(mesh):
            self.weights = decoder_weights.prepare(params, compute)
        self.prefill = jax.jit(decoding.prefill, static_argnames=("n_slots", "scored"))
        self.decode = jax.jit(decoding.decode, static_argnames="scored", donate_argnums=1)
        self._prompt_scores = jax.jit(decoding.prompt_scores)

    def check(self, prompt: list[int], options: sampling_options.Options) -> None:
        """Check that a prompt can be continued.

        Raises:
            UserError: the prompt is empty, too long or has ids that the model does not know; or an
                option is out of range.
        """
        options.check()
        if not prompt:
            raise errors.UserError("a prompt is empty: give at least one token", page=_PAGE)
        most = self.model.seq_len - min(options.max_new_tokens, 1)
        if len(prompt) > most:
            raise errors.UserError(
                f"a prompt has {len(prompt)} tokens, and model.seq_len={self.model.seq_len} leaves "
                f"no room for more: give at most {most}",
                page=_PAGE,
            )
        if not 0 <= min(prompt) <= max(prompt) < self.model.vocab_size:
            raise errors.UserError(
                f"a prompt has ids from {min(prompt)} to {max(prompt)}, but the model knows ids "
                f"from 0 to {self.model.vocab_size - 1}: use the tokenizer that it was trained "
                "with",
                page=_PAGE,
            )

    def room(self, prompt: list[int]) -> int:
        """Return how many tokens fit after a prompt: positions are learned up to seq_len."""
        return self.model.seq_len - len(prompt)

    def limit(self, prompt: list[int], options: sampling_options.Options) -> int:
        """Return how many new tokens a row gets at most."""
        return min(options.max_new_tokens, self.room(prompt))

    def stream(self, rows: list[Row]) -> Iterator[list[list[int]]]:
        """Yield the new tokens of each row, some at a time, until all rows are done.

        A row ends with the end-of-text token, which is yielded too, or at its `limit`.

        Raises:
            UserError: as `check`.
        """
        for step in self.steps(rows, scored=False):
            yield step.tokens

    def steps(self, rows: list[Row], *, scored: bool) -> Iterator[Step]:
        """Yield tokens as `stream`, with the score of each token if `scored`.

        Raises:
            UserError: as `check`.
        """
        for row in rows:
            self.check(row.prompt, row.options)
        limits = [self.limit(row.prompt, row.options) for row in rows]
        if not any(limits):
            return
        prompts, options = self._padded(rows, limits)
        n_slots = bucket(prompts.tokens_BT.shape[1] + max(limits))
        progress, first = self._call(self.prefill, prompts, options, n_slots=n_slots, scored=scored)
        new = jax.tree.map(lambda x: x[:, None], first)
        while True:
            is_done = not np.asarray(progress.n_left_B).any()
            yield _step(new, len(rows))
            if is_done:
                return
            progress, new = self._call(self.decode, progress, options, scored=scored)

    def score(self, prompts: list[list[int]]) -> list[list[Score]]:
        """Return the scores of each prompt's tokens but the first, which nothing precedes.

        Prompts are already checked, and have up to seq_len tokens.
        """
        padded = self._call(self._prompt_scores, *self._padded_tokens(prompts))
        scores = _scores(padded)[: len(prompts)]
        return [row[len(row) - len(p) + 1 :] for row, p in zip(scores, prompts, strict=True)]

    def _padded(
        self, rows: list[Row], limits: list[int]
    ) -> tuple[decoding.Prompts, sampling.OptionArrays]:
        """Return the arrays of a batch; spare rows come last and generate nothing."""
        n_spare = self._n_rows(len(rows)) - len(rows)
        eod_ids = [-1 if row.options.ignore_eod else self.eod_id for row in rows]
        options = sampling.option_arrays(
            [row.options for row in rows] + [sampling_options.Options(temperature=0.0)] * n_spare,
            [row.number for row in rows] + [0] * n_spare,
        )
        tokens_BT, padding_B = self._padded_tokens([row.prompt for row in rows])
        prompts = decoding.Prompts(
            tokens_BT=tokens_BT,
            padding_B=padding_B,
            n_left_B=np.asarray(limits + [0] * n_spare, np.int32),
            eod_B=np.asarray(eod_ids + [-1] * n_spare, np.int32),
        )
        return prompts, options

    def _padded_tokens(self, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return prompts padded on the left, `[B, T]`, and by how much, `[B]`; spare rows last."""
        length = bucket(max(map(len, prompts)))
        rows = [*prompts, *[[0]] * (self._n_rows(len(prompts)) - len(prompts))]
        tokens_BT = np.zeros((len(rows), length), np.int32)
        for row, prompt in zip(tokens_BT, rows, strict=True):
            row[length - len(prompt) :] = prompt
        return tokens_BT, np.asarray([length - len(row) for row in rows], np.int32)

    def _n_rows(self, n: int) -> int:
        """Return a power of two that is not below n, or the next multiple of the data axes."""
        parallel = rules.data_parallel_size(self._mesh)
        return -(-(1 << (n - 1).bit_length()) // parallel) * parallel

    def _call(self, program: Callable[..., Result], *args: object, **kwargs: object) -> Result:
        with jax.set_mesh(self._mesh):
            return program(self.weights, *args, **kwargs)


def _step(new: decoding.NewTokens, n_rows: int) -> Step:
    """Return the tokens and scores of the first rows, from arrays `[B, N]`."""
    tokens_BN = np.asarray(new.tokens)[:n_rows]
    tokens = [[token for token in row if token >= 0] for row in tokens_BN.tolist()]
    if new.scores is None:
        return Step(tokens, [[] for _ in tokens])
    scores = _scores(new.scores)[:n_rows]
    return Step(tokens, [row[: len(t)] for row, t in zip(scores, tokens, strict=True)])


def _scores(scores: sampling.Scores) -> list[list[Score]]:
    """Return the scores of each token of each row, from arrays `[B, T]`."""
    arrays = [np.asarray(x).tolist() for x in jax.tree.leaves(scores)]
    return [
        [
            Score(own, tuple(zip(ids, logprobs, strict=True)))
            for own, ids, logprobs in zip(*row, strict=True)
        ]
        for row in zip(*arrays, strict=True)
    ]


def bucket(n: int) -> int:
    """Return the least of 8, 12, 16, 24, 32, 48, ... that is not below n."""
    power = 8
    while power < n:
        if power * 3 // 2 >= n:
            return power * 3 // 2
        power *= 2
    return power
