"""Sums over the replicas of the `data` axis and over pipeline stages."""

import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from gpt3jax.sharding import layouts, meshes, rules


def sum_over_replicas(
    function: Any, params: Any, batch: Any, has_grads: bool = False, shard_grads: bool = False
) -> Any:
    """Return the global sums of what (params, batch) -> sums gives on a replica or a stage.

    The function runs on each `data` replica's own rows of the batch `[M, B, ...]` and on each
    stage's own layers, manual over these two axes; all else is left to the partitioner. Sums are
    added up over both, once; with `has_grads` they are (sum, gradient like params), and gradients
    of layers stay with their stage. With `shard_grads` each replica gets its `data_dim` part of
    the gradient only.
    """
    manual = frozenset({"data", "stage"})
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape["data"] == mesh.shape["stage"] == 1:
        return function(params, batch)

    def local_spec(node: Any, over_data: bool = False) -> Any:
        if not layouts.is_variable(node):
            return PartitionSpec()
        dim = layouts.data_dim(node, mesh) if over_data else None
        specification = rules.spec(layouts.variable_axes(node), frozenset(meshes.AXES) - manual)
        return jax.tree.map(lambda _: layouts.with_data(specification, dim), node)

    def add_up(node: Any) -> Any:
        of_stage = layouts.is_variable(node) and "layers" in layouts.variable_axes(node)
        dim = None
        if layouts.is_variable(node) and shard_grads:
            dim = layouts.data_dim(node, jax.sharding.get_abstract_mesh())
        if dim is None:
            return jax.lax.psum(node, "data" if of_stage else ("data", "stage"))
        if not of_stage:
            node = jax.lax.psum(node, "stage")
        # All axes manual: left to the partitioner, it would gather the gradient first.
        scatter = functools.partial(
            jax.lax.psum_scatter, axis_name="data", scatter_dimension=dim, tiled=True
        )
        axes = layouts.variable_axes(node)
        return jax.tree.map(rules.map_shards(scatter, [axes], axes), node)

    specs = jax.tree.map(local_spec, params, is_leaf=layouts.is_variable)
    grad_specs = jax.tree.map(
        functools.partial(local_spec, over_data=shard_grads), params, is_leaf=layouts.is_variable
    )
    summed: Any = jax.shard_map(
        lambda *args: jax.tree.map(add_up, function(*args), is_leaf=layouts.is_variable),
        in_specs=(specs, PartitionSpec(None, "data")),
        out_specs=(PartitionSpec(), grad_specs) if has_grads else PartitionSpec(),
        axis_names=manual,
        check_vma=False,
    )
    return summed(params, batch)
