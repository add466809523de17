"""How layers are stacked in arrays: `[L, ...]`, or `[R, L / R, ...]` of R virtual stages.

Either way they are in their natural order.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from gpt3jax.checkpoint import array_names
from gpt3jax.sharding import layouts


def as_written(abstract_state: array_names.PyTree, config: dict[str, Any]) -> array_names.PyTree:
    """Return the layout with layers stacked as in a run of this (flat) config."""
    virtual_stages: int = config.get("mesh.virtual_stages", 1)

    def restack(n_stacked: int, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return _restacked_shape(leaf, n_stacked, virtual_stages) if n_stacked else leaf

    return _map_with_stacked(restack, abstract_state)


def stacked_dims(state: array_names.PyTree) -> array_names.PyTree:
    """Return, for each array of a state, how many of its first dimensions stack layers."""
    return _map_with_stacked(lambda n_stacked, _: n_stacked, state)


def stacked_by_name(abstract_state: array_names.PyTree, config: dict[str, Any]) -> dict[str, int]:
    """Return `stacked_dims` by the arrays' names, as a run of this (flat) config wrote them."""
    return dict(array_names.named_leaves(stacked_dims(as_written(abstract_state, config))))


def _map_with_stacked(
    function: Callable[[int, Any], object], state: array_names.PyTree
) -> array_names.PyTree:
    """Call a function for each array, with the number of its dimensions that stack layers."""

    def map_variable(node: array_names.PyTree) -> array_names.PyTree:
        axes = layouts.variable_axes(node) if layouts.is_variable(node) else ()
        n_stacked = axes.index("layers") + 1 if "layers" in axes else 0
        return jax.tree.map(functools.partial(function, n_stacked), node)

    return layouts.map_variables(map_variable, state)


def _restacked_shape(
    leaf: jax.ShapeDtypeStruct, n_stacked: int, virtual_stages: int
) -> jax.ShapeDtypeStruct:
    """Return the layout of an array with its layers stacked for so many virtual stages."""
    assert isinstance(leaf.sharding, jax.sharding.NamedSharding)
    mesh, n_layers = leaf.sharding.mesh, math.prod(leaf.shape[:n_stacked])
    stacked: tuple[int, ...] = (n_layers,)
    if virtual_stages > 1:
        stacked = (virtual_stages, n_layers // virtual_stages)
    if stacked == leaf.shape[:n_stacked]:
        return leaf
    stage_axis = "stage" if stacked[-1] % mesh.shape["stage"] == 0 else None
    layer_axes = leaf.sharding.spec[n_stacked:]
    spec = jax.sharding.PartitionSpec(*(None,) * (len(stacked) - 1), stage_axis, *layer_axes)
    return jax.ShapeDtypeStruct(
        (*stacked, *leaf.shape[n_stacked:]),
        leaf.dtype,
        sharding=jax.sharding.NamedSharding(mesh, spec),
    )
