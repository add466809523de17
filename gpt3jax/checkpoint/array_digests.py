"""Digests of arrays: position-dependent checksums that are equal on every mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gpt3jax.checkpoint import array_blocks, array_names


def digest(x: jax.Array, first: jax.typing.ArrayLike = 0) -> jax.Array:
    """Return uint32 `[2]`: two position-dependent checksums of an array, as sums modulo 2^32.

    `first` is how many elements of a larger array come before these: the digests of its blocks add
    up to its own digest.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    position, stride = jnp.full(x.shape, first, jnp.uint32), 1
    for dim in reversed(range(x.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        position += iota * np.uint32(stride % 2**32)
        stride *= x.shape[dim]
    sums = []
    for multiplier in (0x9E3779B1, 0x85EBCA77):
        # A bijection of the bits at each position (Murmur3's finaliser), then a sum.
        h = bits ^ (position * np.uint32(multiplier))
        h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
        sums.append((h ^ (h >> 16)).sum(dtype=jnp.uint32))
    return jnp.stack(sums)


@jax.jit
def digests(state: array_names.PyTree) -> jax.Array:
    """Return uint32 `[leaves, 2]`: the digest of each array of a state.

    They are the same on every mesh; a single changed value always changes both sums.
    """
    return jnp.stack([digest(leaf) for leaf in jax.tree.leaves(state)])


def digest_of_blocks(blocks: array_blocks.Blocks) -> np.ndarray:
    """Return the digest, uint32 `[2]`, of an array that is made block by block."""
    parts = [block_digest(blocks.shape, first, rows) for first, rows in blocks]
    return np.asarray(np.sum(parts, axis=0, dtype=np.uint32))


def block_digest(shape: tuple[int, ...], first_row: int, rows: np.ndarray) -> np.ndarray:
    """Return what some rows of an array of a shape add to its digest, uint32 `[2]`."""
    n_before = first_row * math.prod(shape[1:]) % 2**32
    return np.asarray(_digest(rows, np.uint32(n_before)))


_digest = jax.jit(digest)
