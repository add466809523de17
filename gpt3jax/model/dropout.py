"""Dropout whose masks are a function of where a value stands in the run, and of nothing else.

The key of a draw comes from the seed, the layer and the place in the layer. It is folded with the
sample's number in the run, the position in the sequence and, in attention, the head: that gives
each row of values two random words (`row_words`, by Threefry). A value's own bits are a hash of
these words and of its column, the channel or the key's position (`kept`). So a mask depends neither
on the mesh nor on the sizes of the batch, the microbatch and the blocks in which it is made, and
XLA, NumPy and kernels of other makers can draw the same bits in a few integer operations each.

Source of the hash: "lowbias32" of C. Wellons, Prospecting for Hash Functions (2018), with the
columns' steps of xxHash's first prime before it and the second word in its middle. The words must
be random themselves: counted rows instead would leave patterns. `tests/model/test_dropout.py` tests
its statistics.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt3jax.sharding import sequence

GENERATOR = "a hash of each row's words"  # named in checkpoints: another one draws other masks

_N_LEVELS = 1 << 16  # of the bits of a value


class Noise(NamedTuple):
    """The source of random draws: a key, and the number of each sample in the run."""

    key: Array
    samples_B: Array

    def fold(self, number: int | Array) -> "Noise":
        """Return the noise of a part of the network: of a layer, or of a place in a layer."""
        return Noise(jax.random.fold_in(self.key, number), self.samples_B)


def row_words(noise: Noise, positions_T: Array, n_heads: int = 0) -> Array:
    """Return the two random uint32 words of each row: `[B, T, 2]`, with heads `[B, T, H, 2]`."""

    def over_rows(key: Array, numbers: Array) -> Array:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)

    keys_B = over_rows(noise.key, noise.samples_B)
    keys = jax.vmap(over_rows, in_axes=(0, None))(keys_B, positions_T)
    if n_heads:
        over_positions = jax.vmap(over_rows, in_axes=(0, None))
        keys = jax.vmap(over_positions, in_axes=(0, None))(keys, jnp.arange(n_heads))
    return jax.random.key_data(keys)


def threshold(rate: float) -> int:
    """Return how many of the 65,536 levels of a value's bits are dropped: those below this one."""
    return min(round(rate * _N_LEVELS), _N_LEVELS - 1)


def kept_share(rate: float) -> float:
    """Return the probability with which a value is kept, which kept values are divided by."""
    return 1 - threshold(rate) / _N_LEVELS


def kept(words: Array, columns_S: Array, rate: float) -> Array:
    """Return bools `[..., S]` for the columns of rows with words `[..., 2]`; False is dropped."""
    columns_S = columns_S.astype(jnp.uint32)
    # Two columns share a hash, which has 16 bits for each.
    x = (columns_S >> 1) * np.uint32(0x9E3779B1) + words[..., :1]
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15) ^ words[..., 1:]) * np.uint32(0x846CA68B)
    x ^= x >> 16
    bits = (x >> (16 * (columns_S & 1))) & np.uint32(0xFFFF)
    return bits >= np.uint32(threshold(rate))


def apply(x_BTD: Array, rate: float, noise: Noise | None) -> Array:
    """Zero each value with probability `rate` and scale the rest up; without noise do nothing."""
    if noise is None or rate == 0:
        return x_BTD
    words_BT2 = row_words(noise, sequence.sequence_order(x_BTD.shape[1]))
    kept_BTD = kept(words_BT2, jnp.arange(x_BTD.shape[2]), rate)
    return jnp.where(kept_BTD, x_BTD / kept_share(rate), 0).astype(x_BTD.dtype)
