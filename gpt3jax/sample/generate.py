"""Compiled generation for batches of prompts: what pads them, and yields tokens as they come.

Batch, prompts and cache are rounded up (`bucket`), so programs are compiled for few shapes.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gpt3jax import config, model, sharding
from gpt3jax.sample import decoding, sampling, text_options


class Generator:
    """One model on one mesh.

    Attributes:
        model: the network's config.
        eod_id: the end-of-text token.
    """

    def __init__(
        self, params: model.GPT, compute: model.Compute, mesh: jax.sharding.Mesh, eod_id: int
    ):
        """Take the parameters over: the blocks' own arrays are freed."""
        self.model, self.eod_id, self._mesh = params.model, eod_id, mesh
        with jax.set_mesh(mesh):
            self._weights = decoding.prepare(params, compute)
        self._prefill = jax.jit(decoding.prefill, static_argnames=("n_slots", "mode"))
        self._decode = jax.jit(decoding.decode, static_argnames="mode", donate_argnums=1)

    def check(self, prompt: list[int], options: text_options.Options) -> None:
        """Check that a prompt can be continued.

        Raises:
            UserError: it is empty, too long or has ids that the model does not know; or an option
                is out of range.
        """
        options.check()
        if not prompt:
            raise config.UserError("a prompt is empty: give at least one token")
        if self.room(prompt) < 1:
            raise config.UserError(
                f"a prompt has {len(prompt)} tokens, and model.seq_len={self.model.seq_len} leaves "
                f"no room for more: give at most {self.model.seq_len - 1}"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.model.vocab_size:
            raise config.UserError(
                f"a prompt has ids from {min(prompt)} to {max(prompt)}, and the model has those "
                f"from 0 to {self.model.vocab_size - 1}: use the tokenizer that it was trained with"
            )

    def room(self, prompt: list[int]) -> int:
        """Return how many tokens fit behind a prompt: positions are learned up to seq_len."""
        return self.model.seq_len - len(prompt)

    def stream(
        self, prompts: list[list[int]], options: list[text_options.Options], rows: list[int]
    ) -> Iterator[list[list[int]]]:
        """Yield the new tokens of each row, some at a time, until all rows are done.

        A row ends with the end-of-text token, which is yielded too, after `max_new_tokens`, or
        where the context is full. `rows` number the rows in their request (see `sampling`).

        Raises:
            UserError: as `check`.
        """
        for prompt, option in zip(prompts, options, strict=True):
            self.check(prompt, option)
        n = len(prompts)
        spare = self._n_rows(n) - n
        length = bucket(max(map(len, prompts)))
        limits = [
            min(o.max_new_tokens, self.room(p)) for p, o in zip(prompts, options, strict=True)
        ]
        eods = [-1 if o.ignore_eod else self.eod_id for o in options]
        choice, mode = sampling.make_choice(
            [*options, *[text_options.Options(temperature=0.0)] * spare], [*rows, *[0] * spare]
        )
        prompts = [*prompts, *[[0]] * spare]
        tokens_BT = np.zeros((len(prompts), length), np.int32)
        for row, prompt in zip(tokens_BT, prompts, strict=True):
            row[length - len(prompt) :] = prompt
        arrays = [[length - len(p) for p in prompts], limits + [0] * spare, eods + [-1] * spare]
        progress, new_B = self._call(
            self._prefill,
            tokens_BT,
            *(np.asarray(array, np.int32) for array in arrays),
            choice,
            n_slots=bucket(length + max(limits)),
            mode=mode,
        )
        new_BN = np.asarray(new_B)[:, None]
        while True:
            more = bool(np.asarray(progress.left_B).any())
            yield [[token for token in row if token >= 0] for row in new_BN[:n].tolist()]
            if not more:
                return
            progress, new_BN = self._call(self._decode, progress, choice, mode=mode)
            new_BN = np.asarray(new_BN)

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return function(self._weights, *args, **kwargs)

    def _n_rows(self, n: int) -> int:
        """Return a power of two that is not below n, or the next multiple of the data axes."""
        parallel = sharding.data_parallel_size(self._mesh)
        return -(-(1 << (n - 1).bit_length()) // parallel) * parallel


def bucket(n: int) -> int:
    """Return the least of 8, 12, 16, 24, 32, 48, ... that is not below n."""
    power = 8
    while power < n:
        if power * 3 // 2 >= n:
            return power * 3 // 2
        power *= 2
    return power
