"""GELU in few operations: its values and slopes, against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax.model import gelu


def expected(x):
    """Return GELU by the formula with tanh, and its slope."""
    c, b = np.sqrt(2 / np.pi), 0.044715
    t = np.tanh(c * (x + b * x**3))
    return x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t**2) * c * (1 + 3 * b * x**2) / 2


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_values_and_slopes_are_those_of_the_formula(dtype, tolerance):
    rng = np.random.default_rng()
    x = jnp.asarray([*3 * rng.normal(size=1000), -1e4, -60, 0, 60, 1e4], dtype)
    found, pullback = jax.vjp(gelu.gelu, x)
    assert found.dtype == x.dtype
    value, slope = expected(np.float64(x))
    np.testing.assert_allclose(np.float64(found), value, rtol=tolerance, atol=2 * tolerance)
    (d_x,) = pullback(jnp.ones_like(x))
    assert d_x.dtype == x.dtype
    np.testing.assert_allclose(np.float64(d_x), slope, rtol=tolerance, atol=2 * tolerance)


def test_the_derivative_keeps_the_input_alone():
    x = jnp.ones((4, 8), jnp.bfloat16)
    kept = jax.tree.leaves(jax.vjp(gelu.gelu, x)[1])
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(x.shape, x.dtype)]
