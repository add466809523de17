"""The loss of each token of given rows under a model, on any mesh.

Rows are padded on the right, which a causal network does not see, and their length is rounded up,
so that programs are compiled for few shapes.
"""

from typing import NamedTuple

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


class RowLosses(NamedTuple):
    """The losses (nats) of a row's tokens but the first, and whether each is the likeliest one."""

    losses: np.ndarray
    is_likeliest: np.ndarray


class Scorer:
    """One model on one mesh.

    Attributes:
        seq_len: the longest context (tokens).
        n_rows: rows of one batch: `batch_size` rounded up to a multiple of the mesh's shards.
    """

    def __init__(self, params: gpt.GPT, program: step.Program, data: schema.Data, batch_size: int):
        """Use parameters on the program's mesh; `data` says what an end of a document changes."""
        n_shards = rules.data_parallel_size(program.mesh)
        self.seq_len = params.model.seq_len
        self.n_rows = -(-batch_size // n_shards) * n_shards
        self._params, self._program, self._data = params, program, data
        self._losses = jax.jit(token_losses, static_argnames="compute")

    def score(self, rows: list[np.ndarray]) -> list[RowLosses]:
        """Return the losses of each row: n of n + 1 tokens, each in the context of those before it.

        At most `n_rows` rows of at most seq_len + 1 tokens.

        Raises:
            UserError: a token is not in the model's vocabulary.
        """
        assert len(rows) <= self.n_rows and max(map(len, rows)) <= self.seq_len + 1
        lengths = [len(row) - 1 for row in rows]
        n_positions = min(self.seq_len, generate.bucket(max(lengths)))
        padded = np.zeros((self.n_rows, n_positions + 1), np.int32)
        for out, row in zip(padded, rows, strict=False):
            _check(row, self._params.model)
            out[: len(row)] = row
        tokens_BT = padded[:, :-1]
        # Not the loss mask: every token counts.
        _, positions_BT, segments_BT = samples.end_of_document_effects(tokens_BT, self._data)
        with jax.set_mesh(self._program.mesh):
            losses_BT, is_likeliest_BT = self._losses(
                self._params,
                tokens_BT,
                padded[:, 1:],
                positions_BT,
                segments_BT,
                compute=self._program.compute,
            )
        arrays = zip(np.asarray(losses_BT), np.asarray(is_likeliest_BT), lengths, strict=False)
        return [RowLosses(losses[:n], is_likeliest[:n]) for losses, is_likeliest, n in arrays]


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

    def score_chunk(start: Array) -> tuple[Array, Array]:
        x, targets = (jax.lax.dynamic_slice_in_dim(a, start, size, 1) for a in (x_BTD, targets_BT))
        logits_BTV = loss.logits(x, head_VD, params.model.softmax_size)
        hits_BTV = jnp.arange(logits_BTV.shape[-1]) == targets[..., None]
        target_BT = jnp.where(hits_BTV, logits_BTV, 0).sum(-1)
        losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT
        return losses_BT, jnp.argmax(logits_BTV, axis=-1) == targets

    def join(chunks: Array) -> Array:
        return jnp.moveaxis(chunks, 0, 1).reshape(targets_BT.shape)

    losses, is_likeliest = jax.lax.map(score_chunk, jnp.arange(0, n_positions, size))
    return join(losses), join(is_likeliest)


def _check(row: np.ndarray, cfg: schema.Model) -> None:
    low, high = int(row.min()), int(row.max())
    if low < 0 or high >= cfg.vocab_size:
        raise errors.UserError(
            f"there are token ids from {low} to {high}, but the model knows ids from 0 to "
            f"{cfg.vocab_size - 1}: use the tokenizer or a corpus that it was trained with",
            page="data.md#when-data-is-refused",
        )
