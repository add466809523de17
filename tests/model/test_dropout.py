"""The masks of dropout: the same bits as NumPy's, in any pieces, and as random as they must be.

Statistics are made of 2^24 draws a seed as z values, which lie within 5 for a good generator. Two
generators with a known fault, one multiplication too few and counted rows, must fail them.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax.model import dropout

from numpy_dropout import fold_in, numpy_bits, numpy_kept, numpy_words

RATE = 0.1
LAYERS, SAMPLES, POSITIONS, HEADS, COLUMNS = 2, 4, 64, 8, 4096
LIMIT = 5.0  # of |z|: about 150 values a seed, each beyond it with probability 6e-7


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("rate", [0.1, 0.5, 1e-4, 0.99999])
def test_masks_are_numpys_bit_for_bit(rate):
    rng = np.random.default_rng(0)
    seed, layer, place = (int(n) for n in rng.integers(1, 2**31, 3))
    samples = rng.integers(0, 2**31, 3)
    positions, columns = rng.permutation(2048)[:40], np.arange(3, 200)  # from an odd one on
    noise = dropout.Noise(jax.random.key(seed), jnp.asarray(samples)).fold(layer).fold(place)
    words = dropout.row_words(noise, jnp.asarray(positions), 6)
    key = fold_in(fold_in((np.uint32(0), np.uint32(seed)), layer), place)
    expected = numpy_kept(key, samples, positions, range(6), columns, rate)
    np.testing.assert_array_equal(dropout.kept(words, jnp.asarray(columns), rate), expected)


def test_masks_do_not_depend_on_the_pieces_that_they_are_made_in():
    """Samples, positions, heads and columns alone, in another order and from another start."""
    noise = dropout.Noise(jax.random.key(3), jnp.array([5, 2**31 - 1]))
    words = dropout.row_words(noise, jnp.arange(64), 4)
    whole = np.asarray(dropout.kept(words, jnp.arange(300), 0.3))
    alone = dropout.Noise(noise.key, noise.samples_B[1:])
    turned = dropout.row_words(alone, jnp.arange(64)[::-1], 4)[:, :, 2:]
    part = dropout.kept(turned, jnp.arange(101, 300), 0.3)
    np.testing.assert_array_equal(part, whole[1:, ::-1, 2:, 101:])


def test_rows_without_heads_are_others_than_those_of_a_head():
    noise = dropout.Noise(jax.random.key(3), jnp.arange(2))
    plain, heads = (dropout.row_words(noise, jnp.arange(8), n) for n in (0, 2))
    assert plain.shape == (2, 8, 2) and heads.shape == (2, 8, 2, 2)
    words = np.concatenate([np.asarray(x, np.uint64).reshape(-1, 2) for x in (plain, heads)])
    assert len(set(map(tuple, words.tolist()))) == 2 * 8 * 3


def test_the_scale_makes_up_for_what_is_dropped():
    x = np.ones((8, 64, 512), np.float32)
    out = dropout.apply(jnp.asarray(x), RATE, dropout.Noise(jax.random.key(1), jnp.arange(8)))
    n = x.size
    assert abs(np.asarray(out).mean() - 1) < 5 * np.sqrt(RATE / (1 - RATE) / n)
    assert np.unique(out).tolist() == pytest.approx([0, 1 / dropout.kept_share(RATE)])


def draws(seed, generator):
    """Return dropped values as zeros and ones `[layers, samples, positions, heads, columns]`."""
    layers = []
    for layer in range(LAYERS):
        key = fold_in((np.uint32(0), np.uint32(seed)), layer)
        words = numpy_words(key, range(SAMPLES), range(POSITIONS), range(HEADS))
        if generator == "counted rows":
            rows = np.arange(words[0].size, dtype=np.uint32).reshape(words[0].shape)
            words = rows + np.uint32(seed), np.full_like(rows, layer)
        n_products = 1 if generator == "one product" else 2
        layers.append(numpy_bits(words, range(COLUMNS), n_products) < dropout.threshold(RATE))
    return np.stack(layers)


def z_values(dropped):
    """Return what is to be normal with a deviation of 1, by name."""
    rate = dropout.threshold(RATE) / 65536
    x = (dropped - np.float32(rate)) / np.float32(np.sqrt(rate * (1 - rate)))
    found = {"rate": x.sum(dtype=np.float64) / np.sqrt(x.size)}

    def correlation(a, b):
        return float(np.einsum("lnths,lnths->", a, b, optimize=False)) / np.sqrt(a.size)

    axes = ("layer", "sample", "position", "head", "column")
    for axis, name in enumerate(axes):
        for lag in (1, 2, 3, 4, 7, 8, 16, 64, 256, 1024):
            if lag < x.shape[axis]:
                n = x.shape[axis]
                a, b = (x.take(range(*r), axis) for r in ((n - lag,), (lag, n)))
                found[f"{name} + {lag}"] = correlation(a, b)
    for lag in (1, 2, 5):  # one position and one column further on, or back
        found[f"diagonal {lag}"] = correlation(x[:, :, lag:, :, lag:], x[:, :, :-lag, :, :-lag])
        found[f"antidiagonal {lag}"] = correlation(x[:, :, lag:, :, :-lag], x[:, :, :-lag, :, lag:])
    # Too many or too few drops in a row of values, along each axis: the variance of the sums.
    for axis, name in enumerate(axes[1:], start=1):
        n = x.shape[axis]
        squares = x.sum(axis, dtype=np.float64) ** 2 / n
        kurtosis = (1 - 6 * rate * (1 - rate)) / (rate * (1 - rate)) / n
        found[f"sums over {name}"] = (squares.mean() - 1) / np.sqrt((2 + kurtosis) / squares.size)
    # Patterns of 8 neighbours: chi square with 255 degrees of freedom, of those that are expected.
    bits = np.packbits(dropped, axis=-1).ravel()
    ones = np.array([bin(i).count("1") for i in range(256)])
    expected = bits.size * rate**ones * (1 - rate) ** (8 - ones)
    common = expected > 20
    chi = ((np.bincount(bits, minlength=256) - expected)[common] ** 2 / expected[common]).sum()
    found["patterns"] = (chi - common.sum()) / np.sqrt(2 * common.sum())
    # No frequency of columns stands out: the largest of the mean periodogram's values.
    power = (np.abs(np.fft.rfft(x[0], axis=-1)) ** 2).mean((0, 1, 2))[1:-1] / COLUMNS
    found["spectrum"] = (power.max() - 1) * np.sqrt(x[0].size / COLUMNS) - 3
    return found


SEEDS = [0, pytest.param(1234, marks=pytest.mark.slow), pytest.param(2**31, marks=pytest.mark.slow)]


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_random_over_every_coordinate(seed):
    found = z_values(draws(seed, "ours"))
    assert len(found) > 35
    assert {name: z for name, z in found.items() if abs(z) > LIMIT} == {}


@pytest.mark.parametrize("generator", ["one product", "counted rows"])
def test_a_generator_with_a_known_fault_fails(generator):
    found = z_values(draws(0, generator))
    assert max(map(abs, found.values())) > 3 * LIMIT, found


def test_no_two_layers_samples_positions_or_heads_share_their_words():
    words = np.stack(
        [
            np.stack(numpy_words(fold_in((0, 7), layer), range(16), range(256), range(8)))
            for layer in map(np.uint32, range(4))
        ]
    ).astype(np.uint64)
    both = words[:, 0] << np.uint64(32) | words[:, 1]
    assert len(np.unique(both)) == both.size
    for a, b in itertools.combinations(range(4), 2):
        assert not np.array_equal(both[a], both[b])
