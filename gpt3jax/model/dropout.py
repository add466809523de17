"""Dropout whose masks are a function of where a value stands in the run, and of nothing else.

The key of a draw comes from the seed, the layer and the place in the layer; it is then folded with
the sample's number in the run and with the position in the sequence. So a mask depends neither on
the mesh nor on the sizes of the batch and the microbatch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt3jax.sharding import sequence


class Noise(NamedTuple):
    """The source of random draws: a key, and the number of each sample in the run."""

    key: Array
    samples_B: Array

    def fold(self, number: int | Array) -> "Noise":
        """Return the noise of a part of the network: of a layer, or of a place in a layer."""
        return Noise(jax.random.fold_in(self.key, number), self.samples_B)


def keep_mask(
    noise: Noise, rate: float, positions_T: Array, rows: tuple[int, ...], size: int
) -> Array:
    """Return bools `[B, T, *rows, size]`, True with probability 1 - rate."""
    threshold = np.uint32(min(round(rate * 2**32), 2**32 - 1))

    def draw(sample: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(noise.key, sample), position)
        if not rows:
            return jax.random.bits(key, (size,)) >= threshold
        bits = jax.vmap(lambda k: jax.random.bits(k, (size,)))(jax.random.split(key, rows))
        return bits >= threshold

    over_positions = jax.vmap(draw, in_axes=(None, 0))
    return jax.vmap(over_positions, in_axes=(0, None))(noise.samples_B, positions_T)


def apply(x_BTD: Array, rate: float, noise: Noise | None) -> Array:
    """Zero each value with probability `rate` and scale the rest up; without noise do nothing."""
    if noise is None or rate == 0:
        return x_BTD
    positions_T = sequence.sequence_order(x_BTD.shape[1])
    keep_BTD = keep_mask(noise, rate, positions_T, (), x_BTD.shape[2])
    return jnp.where(keep_BTD, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)
