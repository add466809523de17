"""STUB to be replaced."""

import functools

import jax
import jax.numpy as jnp


def move(state, like):
    def one(x, l):
        y = jax.jit(functools.partial(jnp.reshape, shape=l.shape), out_shardings=l.sharding)(x)
        y.block_until_ready()
        if y is not x:
            x.delete() if not x.is_deleted() else None
        return y

    return jax.tree.unflatten(jax.tree.structure(like), list(map(one, jax.tree.leaves(state), jax.tree.leaves(like))))
