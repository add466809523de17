"""How layers are stacked in arrays: `[L, ...]`, or `[R, L / R, ...]` of R virtual stages."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gpt3jax.sharding import layouts


def as_written(abstract_state: Any, virtual_stages: int) -> Any:
    """Return the layout with layers stacked as in a run of so many virtual stages.

    Either way they are in their natural order: `[L, ...]`, or `[R, L / R, ...]`.
    """

    def one(node: Any) -> Any:
        axes = layouts.variable_axes(node) if layouts.is_variable(node) else ()
        if "layers" not in axes:
            return node
        n_stacked = axes.index("layers") + 1
        return jax.tree.map(lambda leaf: restack(leaf, n_stacked), node)

    def restack(leaf: Any, n_stacked: int) -> Any:
        mesh, n_layers = leaf.sharding.mesh, math.prod(leaf.shape[:n_stacked])
        stacked: tuple[int, ...] = (n_layers,)
        if virtual_stages > 1:
            stacked = (virtual_stages, n_layers // virtual_stages)
        if stacked == leaf.shape[:n_stacked]:
            return leaf
        over_stages = "stage" if stacked[-1] % mesh.shape["stage"] == 0 else None
        of_layer = leaf.sharding.spec[n_stacked:]
        spec = jax.sharding.PartitionSpec(*(None,) * (len(stacked) - 1), over_stages, *of_layer)
        return jax.ShapeDtypeStruct(
            (*stacked, *leaf.shape[n_stacked:]),
            leaf.dtype,
            sharding=jax.sharding.NamedSharding(mesh, spec),
        )

    return jax.tree.map(one, abstract_state, is_leaf=layouts.is_variable)


def restacked(leaf: Any, like: jax.ShapeDtypeStruct) -> Any:
    """Return an array in the shape and layout of `like`."""
    if leaf.shape == like.shape:
        return leaf
    reshape = functools.partial(jnp.reshape, shape=like.shape)
    return jax.jit(reshape, out_shardings=like.sharding)(leaf)
