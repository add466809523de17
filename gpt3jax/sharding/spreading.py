"""Layouts in which each replica of an array has a share of it, and the way back to whole replicas.

What is read from storage in such a layout is read once, by all devices together. The rest goes over
the network between devices, which is faster.
"""

import functools
import math
from collections.abc import Iterator
from typing import TypeAlias

import jax
from jax.sharding import NamedSharding, PartitionSpec

from gpt3jax.sharding import slabs

AxesOfDims: TypeAlias = tuple[tuple[str, ...], ...]


def spread(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Return an array's layout in which the mesh axes that did not cut it cut it as well.

    An axis that divides no dimension is left out: along it, replicas stay whole.
    """
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    before = [slabs.axes_of_dim(sharding.spec, dim) for dim in range(len(leaf.shape))]
    more = _more_axes(sharding, before, leaf.shape)
    if not any(more):
        return leaf
    spec = PartitionSpec(*(axes + more[dim] for dim, axes in enumerate(before)))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(sharding.mesh, spec))


def gather(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Return an array in the layout `like`, of which it has the `spread` one; it is deleted."""
    source, target = array.sharding, like.sharding
    if source == target:
        return array
    gathered = jax.block_until_ready(_program(source, target, array.ndim)(array))
    array.delete()
    return gathered


def _more_axes(
    sharding: NamedSharding, before: list[tuple[str, ...]], shape: tuple[int, ...]
) -> AxesOfDims:
    """Return, for each dimension, the axes that cut it as well.

    If they can, all cut the first dimension that they divide. So Orbax shares the writing among
    replicas, and what is read are whole chunks of what was written on the same mesh.
    """
    sizes, mesh = list(sharding.shard_shape(shape)), sharding.mesh
    cutting = {axis for axes in before for axis in axes}
    idle = tuple(a for a in mesh.axis_names if a not in cutting and mesh.shape[a] > 1)
    together = math.prod(mesh.shape[axis] for axis in idle)
    is_shared = any(size % together == 0 for size in sizes)
    more: list[tuple[str, ...]] = [()] * len(shape)
    for axes in [idle] if is_shared else [(axis,) for axis in idle]:
        n = math.prod(mesh.shape[axis] for axis in axes)
        dim = next((dim for dim, size in enumerate(sizes) if size % n == 0), None)
        if dim is not None:
            more[dim] += axes
            sizes[dim] //= n
    return tuple(more)


@functools.cache  # moments have the layouts of their parameters
def _program(source: NamedSharding, target: NamedSharding, n_dims: int) -> jax.stages.Wrapped:
    def whole(part: jax.Array) -> jax.Array:
        for dim, axes in _steps(source.spec, target.spec, n_dims):
            part = jax.lax.all_gather(part, axes, axis=dim, tiled=True)
        return part

    mapped = jax.shard_map(
        whole, mesh=source.mesh, in_specs=source.spec, out_specs=target.spec, check_vma=False
    )
    return jax.jit(mapped, out_shardings=target)


def _steps(
    source: PartitionSpec, target: PartitionSpec, n_dims: int
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (dimension, the axes that cut it in the source alone), which are its fastest."""
    for dim in range(n_dims):
        axes = slabs.axes_of_dim(source, dim)[len(slabs.axes_of_dim(target, dim)) :]
        if axes:
            yield dim, axes
