"""Compiled generation for batches of prompts: what pads them, and yields tokens as they come.

Batch, prompts and cache are rounded up (`bucket`), so programs are compiled for few shapes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from gpt3jax import errors
from gpt3jax.model import gpt
from gpt3jax.sample import decoding, sampling, text_options
from gpt3jax.sharding import rules


class Score(NamedTuple):
    """A token's log-probability under the model; the likeliest tokens there, and theirs."""

    logprob: float
    likeliest: tuple[tuple[int, float], ...]


class Generator:
    """One model on one mesh.

    Attributes:
        model: the network's config.
        eod_id: the end-of-text token.
    """

    def __init__(self, params: gpt.GPT, compute: gpt.Compute, mesh: jax.sharding.Mesh, eod_id: int):
        """Take the parameters over: the blocks' own arrays are freed."""
        self.model, self.eod_id, self._mesh = params.model, eod_id, mesh
        with jax.set_mesh(mesh):
            self._weights = decoding.prepare(params, compute)
        self._prefill = jax.jit(decoding.prefill, static_argnames=("n_slots", "mode", "scored"))
        self._decode = jax.jit(
            decoding.decode, static_argnames=("mode", "scored"), donate_argnums=1
        )
        self._prompt_scores = jax.jit(decoding.prompt_scores)

    def check(self, prompt: list[int], options: text_options.Options) -> None:
        """Check that a prompt can be continued.

        Raises:
            UserError: it is empty, too long or has ids that the model does not know; or an option
                is out of range.
        """
        options.check()
        if not prompt:
            raise errors.UserError("a prompt is empty: give at least one token")
        most = self.model.seq_len - min(options.max_new_tokens, 1)
        if len(prompt) > most:
            raise errors.UserError(
                f"a prompt has {len(prompt)} tokens, and model.seq_len={self.model.seq_len} leaves "
                f"no room for more: give at most {most}"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.model.vocab_size:
            raise errors.UserError(
                f"a prompt has ids from {min(prompt)} to {max(prompt)}, and the model has those "
                f"from 0 to {self.model.vocab_size - 1}: use the tokenizer that it was trained with"
            )

    def room(self, prompt: list[int]) -> int:
        """Return how many tokens fit behind a prompt: positions are learned up to seq_len."""
        return self.model.seq_len - len(prompt)

    def limit(self, prompt: list[int], options: text_options.Options) -> int:
        """Return how many new tokens a row gets at most."""
        return min(options.max_new_tokens, self.room(prompt))

    def stream(
        self, prompts: list[list[int]], options: list[text_options.Options], rows: list[int]
    ) -> Iterator[list[list[int]]]:
        """Yield the new tokens of each row, some at a time, until all rows are done.

        A row ends with the end-of-text token, which is yielded too, or at its `limit`. `rows`
        number the rows in their request (see `sampling`).

        Raises:
            UserError: as `check`.
        """
        for tokens, _ in self.steps(prompts, options, rows, scored=False):
            yield tokens

    def steps(
        self,
        prompts: list[list[int]],
        options: list[text_options.Options],
        rows: list[int],
        *,
        scored: bool,
    ) -> Iterator[tuple[list[list[int]], list[list[Score]]]]:
        """Yield tokens as `stream`, and beside them the score of each if these are asked for.

        Raises:
            UserError: as `check`.
        """
        for prompt, option in zip(prompts, options, strict=True):
            self.check(prompt, option)
        n = len(prompts)
        spare = self._n_rows(n) - n
        limits = [self.limit(p, o) for p, o in zip(prompts, options, strict=True)]
        if not any(limits):
            return
        eods = [-1 if o.ignore_eod else self.eod_id for o in options]
        choice, mode = sampling.make_choice(
            [*options, *[text_options.Options(temperature=0.0)] * spare], [*rows, *[0] * spare]
        )
        tokens_BT, padding_B = self._padded(prompts)
        static = {"mode": mode, "scored": scored}
        progress, new = self._call(
            self._prefill,
            tokens_BT,
            padding_B,
            np.asarray(limits + [0] * spare, np.int32),
            np.asarray(eods + [-1] * spare, np.int32),
            choice,
            n_slots=bucket(tokens_BT.shape[1] + max(limits)),
            **static,
        )
        new = jax.tree.map(lambda x: x[:, None], new)
        while True:
            more = bool(np.asarray(progress.left_B).any())
            tokens_BN = np.asarray(new.token)[:n]
            tokens = [[token for token in row if token >= 0] for row in tokens_BN.tolist()]
            scores = _scores(new.scores)[:n] if scored else [[] for _ in tokens]
            yield tokens, [row[: len(t)] for row, t in zip(scores, tokens, strict=True)]
            if not more:
                return
            progress, new = self._call(self._decode, progress, choice, **static)

    def score(self, prompts: list[list[int]]) -> list[list[Score]]:
        """Return the scores of each prompt's tokens but the first, which nothing is before.

        Prompts are checked before, and have up to seq_len tokens.
        """
        found = self._call(self._prompt_scores, *self._padded(prompts))
        scores = _scores(found)[: len(prompts)]
        return [row[len(row) - len(p) + 1 :] for row, p in zip(scores, prompts, strict=True)]

    def _padded(self, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return prompts padded on the left, `[B, T]`, and by how much, `[B]`; spare rows last."""
        length = bucket(max(map(len, prompts)))
        rows = [*prompts, *[[0]] * (self._n_rows(len(prompts)) - len(prompts))]
        tokens_BT = np.zeros((len(rows), length), np.int32)
        for row, prompt in zip(tokens_BT, rows, strict=True):
            row[length - len(prompt) :] = prompt
        return tokens_BT, np.asarray([length - len(row) for row in rows], np.int32)

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return function(self._weights, *args, **kwargs)

    def _n_rows(self, n: int) -> int:
        """Return a power of two that is not below n, or the next multiple of the data axes."""
        parallel = rules.data_parallel_size(self._mesh)
        return -(-(1 << (n - 1).bit_length()) // parallel) * parallel


def _scores(scores: sampling.Scores) -> list[list[Score]]:
    """Return the scores of each token of each row, from arrays `[B, T]`."""
    arrays = [np.asarray(x).tolist() for x in jax.tree.leaves(scores)]
    return [
        [
            Score(own, tuple(zip(ids, logs, strict=True)))
            for own, ids, logs in zip(*row, strict=True)
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
