"""GELU and its derivative in few operations, for a hidden layer that is saved.

Elsewhere `jax.nn.gelu` serves better: XLA lets cuBLAS compute it at the end of the product, and
computes its tanh once for the layer and its derivative, where both are needed again.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

_A, _B = 2 * math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """Return x s(a (x + b x^3)) with the logistic function s, computed in fp32, in x's format.

    This is the usual x (1 + tanh(a (x + b x^3) / 2)) / 2: tanh(y) is 2 s(2 y) - 1. On a GPU s is
    much cheaper. The derivative keeps x alone.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * _logistic(x32)).astype(x.dtype)


def _logistic(x32: Array) -> Array:
    return jax.nn.sigmoid(x32 * (_A + _A * _B * x32 * x32))


def _forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _backward(x: Array, d_out: Array) -> tuple[Array]:
    x32 = x.astype(jnp.float32)
    s = _logistic(x32)
    slope = s + x32 * s * (1 - s) * (_A + 3 * _A * _B * x32 * x32)
    return ((d_out * slope).astype(x.dtype),)


gelu.defvjp(_forward, _backward)
