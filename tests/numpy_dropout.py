"""The masks of dropout in NumPy, as `gpt3jax.model.dropout` describes them."""

import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(key, words):
    """Return two uint32 words hashed with a key of two (Salmon et al. 2011, Threefry-2x32-20)."""
    with np.errstate(over="ignore"):
        k = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
        x, y = words[0] + k[0], words[1] + k[1]
        for i in range(5):
            for rotation in _ROTATIONS[i % 2]:
                x = x + y
                y = (y << np.uint32(rotation) | y >> np.uint32(32 - rotation)) ^ x
            x, y = x + k[(i + 1) % 3], y + k[(i + 2) % 3] + np.uint32(i + 1)
        return x, y


def fold_in(key, number):
    return threefry(key, (np.uint32(0), np.asarray(number, np.uint32)))


def numpy_words(key, samples, positions, heads):
    """Return the words of all rows, each `[B, T, H]`."""
    key = fold_in(key, np.asarray(samples)[:, None, None])
    key = fold_in(key, np.asarray(positions)[:, None])
    return fold_in(key, np.asarray(heads))


def numpy_bits(words, columns, n_products=2):
    """Return the 16 bits of each column `[..., S]` of rows, as uint32."""
    a, b = (word[..., None] for word in words)
    s = np.asarray(columns, np.uint32)
    with np.errstate(over="ignore"):
        x = (s >> np.uint32(1)) * np.uint32(0x9E3779B1) + a
        x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
        x ^= x >> np.uint32(15) ^ b
        if n_products == 2:
            x *= np.uint32(0x846CA68B)
        x ^= x >> np.uint32(16)
    return x >> np.uint32(16) * (s & np.uint32(1)) & np.uint32(0xFFFF)


def numpy_kept(key, samples, positions, heads, columns, rate):
    words = numpy_words(key, samples, positions, heads)
    return numpy_bits(words, columns) >= min(round(rate * 65536), 65535)
