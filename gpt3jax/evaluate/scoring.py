"""Losses of given tokens under a model, on any mesh; and the windows that cut a long stream.

Rows are padded on the right, which a causal network does not see, and their length is rounded up,
so that programs are compiled for few shapes.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt3jax import errors, step
from gpt3jax.config import schema
from gpt3jax.data import samples
from gpt3jax.model import gpt, loss
from gpt3jax.sample import generate
from gpt3jax.sharding import rules

_LOGITS_AT_ONCE = 256  # positions of each row whose logits are held


class Scorer:
    """One model on one mesh.

    Attributes:
        seq_len: the longest context (tokens).
        n_rows: rows of one batch, `batch_size` rounded up to what the mesh splits.
    """

    def __init__(self, params: gpt.GPT, program: step.Program, data: schema.Data, batch_size: int):
        """Use parameters on the program's mesh; `data` says what an end of a document changes."""
        n_shards = rules.data_parallel_size(program.mesh)
        self.seq_len = params.model.seq_len
        self.n_rows = -(-batch_size // n_shards) * n_shards
        self._params, self._program, self._data = params, program, data
        self._losses = jax.jit(token_losses, static_argnames="compute")

    def score(self, rows: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return of each row of n + 1 tokens the losses (nats) of the last n, and what greedy gets.

        A token is scored in the context of those before it; the bools tell whether it is the
        likeliest one there. At most `n_rows` rows of at most seq_len + 1 tokens.

        Raises:
            UserError: a token is not of the model's vocabulary.
        """
        assert len(rows) <= self.n_rows and max(map(len, rows)) <= self.seq_len + 1
        lengths = [len(row) - 1 for row in rows]
        n_positions = min(self.seq_len, generate.bucket(max(lengths)))
        padded = np.zeros((self.n_rows, n_positions + 1), np.int32)
        for out, row in zip(padded, rows, strict=False):
            _check(row, self._params.model)
            out[: len(row)] = row
        tokens_BT = padded[:, :-1]
        effects = samples.end_of_document_effects(tokens_BT, self._data)
        with jax.set_mesh(self._program.mesh):
            losses_BT, greedy_BT = self._losses(
                self._params,
                tokens_BT,
                padded[:, 1:],
                *effects[1:],  # not the mask: every token counts
                compute=self._program.compute,
            )
        found = zip(np.asarray(losses_BT), np.asarray(greedy_BT), lengths, strict=False)
        return [(losses[:n], greedy[:n]) for losses, greedy, n in found]


def token_losses(
    params: gpt.GPT,
    tokens_BT: Array,
    targets_BT: Array,
    positions_BT: Array,
    segments_BT: Array | None,
    *,
    compute: gpt.Compute,
) -> tuple[Array, Array]:
    """Return the loss of each target, fp32 `[B, T]`, and whether it is the likeliest token."""
    arrays = tokens_BT, targets_BT, positions_BT, segments_BT
    tokens_BT, targets_BT, positions_BT, segments_BT = jax.tree.map(
        lambda x: rules.constrain(jnp.asarray(x), "batch", None), arrays
    )
    x_BTD = params(tokens_BT, positions_BT, segments_BT, None, compute)
    head_VD = params.head_VD(compute)
    n_positions = tokens_BT.shape[1]
    size = max(n for n in range(1, _LOGITS_AT_ONCE + 1) if n_positions % n == 0)

    def chunk(start: Array) -> tuple[Array, Array]:
        x, targets = (jax.lax.dynamic_slice_in_dim(a, start, size, 1) for a in (x_BTD, targets_BT))
        logits_BTV = loss.logits(x, head_VD, params.model.softmax_size)
        hits_BTV = jnp.arange(logits_BTV.shape[-1]) == targets[..., None]
        target_BT = jnp.where(hits_BTV, logits_BTV, 0).sum(-1)
        losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT
        return losses_BT, jnp.argmax(logits_BTV, axis=-1) == targets

    def joined(parts: Array) -> Array:
        return jnp.moveaxis(parts, 0, 1).reshape(targets_BT.shape)

    parts: Any = jax.lax.map(chunk, jnp.arange(0, n_positions, size))
    return joined(parts[0]), joined(parts[1])


def windows(n_tokens: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first, counted, stop): tokens [first, stop) are a window, [counted, stop) count in it.

    Every token counts once. The first window counts all of its seq_len tokens, the others the last
    `stride` of theirs, which so have seq_len - stride tokens or more of the window before them.
    The last window ends with the stream, and is as long as the others.
    """
    counted = 0
    while counted < n_tokens:
        stop = min(n_tokens, counted + (stride if counted else seq_len))
        yield max(0, stop - seq_len), counted, stop
        counted = stop


def window_rows(
    tokens: np.ndarray, eod_id: int, seq_len: int, stride: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield a row for `Scorer.score` of each window of a stream, and how many of its tokens count.

    Those are its last ones. Before the stream's first token stands the end-of-document token.
    """
    for first, counted, stop in windows(len(tokens), seq_len, stride):
        before = tokens[first - 1 : first] if first else [eod_id]
        yield np.concatenate([before, tokens[first:stop]]), stop - counted


def _check(row: np.ndarray, cfg: schema.Model) -> None:
    low, high = int(row.min()), int(row.max())
    if low < 0 or high >= cfg.vocab_size:
        raise errors.UserError(
            f"there are token ids from {low} to {high}, and the model has those from 0 to "
            f"{cfg.vocab_size - 1}: use the tokenizer or a corpus that it was trained with"
        )
