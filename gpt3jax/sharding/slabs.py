"""From any layout of an array to slabs, and back.

In slabs one dimension of an array is cut over all devices, and the others are whole. The route
from a layout to slabs takes the mesh's axes one by one, and each of its steps can be undone. The
functions on parts run inside of `jax.shard_map`.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal, TypeAlias

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """A step towards slabs: what happens to an axis that does not cut their dimension yet.

    `slice`: it cut nothing, and now cuts this dimension, that of slabs. `swap`: it cut this
    dimension, and now cuts that of slabs. `gather`: it cut this dimension, and now cuts nothing.
    """

    kind: Literal["slice", "swap", "gather"]
    axis: str
    dim: int


@dataclasses.dataclass(frozen=True)
class Route:
    """The steps from a layout of an array to slabs.

    An axis may have a factor that does not divide the dimension of slabs. So its mesh has two axes
    for each: NAME, which cuts slabs, and before it NAME/rest, over which slabs are replicated. On n
    devices there are gcd(n, size) slabs, whatever the layout.
    """

    mesh: Mesh
    spec: PartitionSpec
    """The layout on this mesh."""
    dim: int
    """The dimension of slabs."""
    n_slabs: int
    steps: list[Step]
    devices: list[int]
    """The numbers of the devices, in the order of their slabs."""


def route(sharding: NamedSharding, shape: Shape, dim: int) -> Route:
    """Return the route from a layout of an array to slabs of a dimension."""
    assert isinstance(sharding.mesh, Mesh)
    axes_of = [axes_of_dim(sharding.spec, i) for i in range(len(shape))]
    sizes = _sizes_in_slabs(sharding.mesh, axes_of, shape[dim], dim)
    mesh = _split(sharding.mesh, sizes)
    steps = [step for step in _steps(axes_of, sizes, dim) if mesh.shape[step.axis] > 1]
    order = [*axes_of[dim], *(step.axis for step in steps if step.kind != "gather")]
    order += [axis for axis in mesh.axis_names if axis not in order]
    devices = np.arange(mesh.size).reshape(mesh.devices.shape)
    devices = devices.transpose([mesh.axis_names.index(axis) for axis in order])
    return Route(
        mesh=mesh,
        spec=PartitionSpec(*(tuple(_split_names(axes)) for axes in axes_of)),
        dim=dim,
        n_slabs=math.prod(sizes.values()),
        steps=steps,
        devices=devices.ravel().tolist(),
    )


def to_slab(part: jax.Array, route: Route) -> jax.Array:
    """Return a device's slab from its part in the layout."""
    for step in route.steps:
        if step.kind == "slice":
            part = _slice(part, step.axis, route.dim)
        elif step.kind == "swap":
            part = jax.lax.all_to_all(part, step.axis, route.dim, step.dim, tiled=True)
        else:
            part = jax.lax.all_gather(part, step.axis, axis=step.dim, tiled=True)
    return part


def from_slab(slab: jax.Array, route: Route) -> jax.Array:
    """Return a device's part in the layout from its slab: the steps of `to_slab` undone."""
    part = slab
    for step in reversed(route.steps):
        if step.kind == "slice":
            part = jax.lax.all_gather(part, step.axis, axis=route.dim, tiled=True)
        elif step.kind == "swap":
            part = jax.lax.all_to_all(part, step.axis, step.dim, route.dim, tiled=True)
        else:
            part = _slice(part, step.axis, step.dim)
    return part


def permuted(slab: jax.Array, source: Route, target: Route) -> jax.Array:
    """Return the slab that a device has at the end of another route; runs on the source's mesh."""
    if source.devices == target.devices:
        return slab
    pairs = list(zip(source.devices, target.devices, strict=True))
    return jax.lax.ppermute(slab, source.mesh.axis_names, pairs)


def axes_of_dim(spec: PartitionSpec, dim: int) -> tuple[str, ...]:
    """Return the axes that cut a dimension, slowest first."""
    entry = spec[dim] if dim < len(spec) else None
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _sizes_in_slabs(
    mesh: Mesh, axes_of: list[tuple[str, ...]], size: int, dim: int
) -> dict[str, int]:
    """Return, of each axis, the factor that cuts slabs; `size` is that of their dimension.

    Axes that cut other dimensions have precedence over those that cut nothing, because what slabs
    do not take of them must be gathered.
    """
    cutting = [axis for axes in axes_of for axis in axes]
    others = [axis for axis in cutting if axis not in axes_of[dim]]
    idle = [axis for axis in mesh.axis_names if axis not in cutting]
    sizes: dict[str, int] = {}
    for axis in (*axes_of[dim], *others, *idle):
        sizes[axis] = math.gcd(mesh.shape[axis], size)
        size //= sizes[axis]
    return sizes


def _split(mesh: Mesh, sizes: dict[str, int]) -> Mesh:
    """Return a mesh whose axes are split into NAME/rest and NAME, the latter of these sizes."""
    both = [(mesh.shape[axis] // sizes[axis], sizes[axis]) for axis in mesh.axis_names]
    shape = [size for pair in both for size in pair]
    names = _split_names(mesh.axis_names)
    return Mesh(mesh.devices.reshape(shape), names, axis_types=(AxisType.Auto,) * len(shape))


def _split_names(axes: tuple[str, ...]) -> list[str]:
    return [name for axis in axes for name in (f"{axis}/rest", axis)]


def _steps(axes_of: list[tuple[str, ...]], sizes: dict[str, int], dim: int) -> Iterator[Step]:
    """Yield the steps, also those over axes of size 1. What only drops data comes first."""
    cutting = {axis for axes in axes_of for axis in axes}
    yield from (Step("slice", axis, dim) for axis in sizes if axis not in cutting)
    for other, axes in enumerate(axes_of):
        for axis in reversed(axes) if other != dim else ():
            yield Step("swap", axis, other)
            yield Step("gather", f"{axis}/rest", other)


def _slice(part: jax.Array, axis: str, dim: int) -> jax.Array:
    size = part.shape[dim] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(part, jax.lax.axis_index(axis) * size, size, dim)
