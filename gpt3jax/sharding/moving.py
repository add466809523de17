"""Moves a train state from one layout to another in the devices' memory, array by array.

XLA by itself would gather whole arrays to go from stages to fsdp, and some are larger than a GPU.
So each array goes by way of slabs: from its layout to slabs, by a permutation to the slabs of the
target, and from these to the target (`slabs`). This serves any two meshes of the same devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt3jax.sharding import slabs

State = TypeVar("State")
Array: TypeAlias = jax.Array | jax.ShapeDtypeStruct
Function: TypeAlias = Callable[[jax.Array], jax.Array]


def move(state: Any, like: State) -> State:
    """Return a state with the shapes and shardings of `like`, and with the same values.

    Layers may be stacked otherwise. Both meshes have the same devices in the same order. Do not use
    `state` afterwards: each of its arrays is deleted as soon as its copy is there, and an array
    whose layout stays is not copied.
    """
    moved = [move_array(*pair) for pair in _pairs(state, like)]
    return jax.tree.unflatten(jax.tree.structure(like), moved)


def move_array(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Return an array in the shape and sharding of `like`, as `move` does."""
    if _stays(array, like):
        return _relabelled(array, _sharding(like))
    program = program_of(array, like)
    moved = jax.block_until_ready(program.jitted(_relabelled(array, program.source)))
    array.delete()
    return _relabelled(moved, _sharding(like))


@dataclasses.dataclass(frozen=True)
class Program:
    """The program that moves arrays of one shape and type between two layouts."""

    jitted: Any  # what `jax.jit` returned
    argument: jax.ShapeDtypeStruct
    """What it is called with: its sharding is that of the array, on a mesh of the program's own."""

    @property
    def source(self) -> NamedSharding:
        """The sharding of its argument."""
        return _sharding(self.argument)

    def compile(self) -> jax.stages.Compiled:
        """Compile it ahead of the move; JAX keeps it for the call."""
        compiled: jax.stages.Compiled = self.jitted.lower(self.argument).compile()
        return compiled


def programs(state: Any, like: Any) -> Iterator[Program]:
    """Yield the program of each array that `move` copies; states may be abstract.

    Arrays of the same shape, type and layouts have the same program.
    """
    for array, target in _pairs(state, like):
        if not _stays(array, target):
            yield program_of(array, target)


def program_of(array: Array, like: jax.ShapeDtypeStruct) -> Program:
    """Return the program that moves an array to the shape and sharding of `like`."""
    source, target = _sharding(array), _sharding(like)
    same = source.mesh.devices.ravel().tolist() == target.mesh.devices.ravel().tolist()
    assert same, "a state moves between meshes of the same devices in the same order"
    return _program(source, array.shape, target, like.shape, array.dtype)


def _pairs(state: Any, like: Any) -> Iterator[tuple[Any, jax.ShapeDtypeStruct]]:
    return zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True)


def _sharding(array: Array) -> NamedSharding:
    assert isinstance(array.sharding, NamedSharding)
    return array.sharding


def _stays(array: Array, like: jax.ShapeDtypeStruct) -> bool:
    if array.shape != like.shape:
        return False
    return bool(_sharding(array).is_equivalent_to(_sharding(like), array.ndim))


def _relabelled(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Return the same buffers as an array with an equivalent sharding."""
    parts = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


@functools.cache  # moments have the layouts of their parameters
def _program(
    source: NamedSharding, shape: slabs.Shape,
    target: NamedSharding, new_shape: slabs.Shape, dtype: jax.typing.DTypeLike,
) -> Program:  # fmt: skip
    dim = _dim_of_slabs(shape, new_shape, source.mesh.size)
    start = slabs.route(source, shape, len(shape) + dim)
    end = slabs.route(target, new_shape, len(new_shape) + dim)
    slab_shape = list(new_shape)
    slab_shape[dim] //= start.n_slabs

    def to_target_slab(part: jax.Array) -> jax.Array:
        slab = slabs.permuted(slabs.to_slab(part, start), start, end)
        return slab.reshape(1, *slab_shape)  # the first dimension is cut over all devices

    def to_target(slab: jax.Array) -> jax.Array:
        return slabs.from_slab(slab.reshape(slab_shape), end)

    def moved(array: jax.Array) -> jax.Array:
        device = PartitionSpec(start.mesh.axis_names)
        slab_by_device = _on_parts(to_target_slab, start.mesh, start.spec, device)(array)
        device = PartitionSpec(end.mesh.axis_names)
        return _on_parts(to_target, end.mesh, device, end.spec)(slab_by_device)

    return Program(
        jax.jit(moved, out_shardings=NamedSharding(end.mesh, end.spec)),
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(start.mesh, start.spec)),
    )


def _on_parts(
    function: Function, mesh: Mesh, in_spec: PartitionSpec, out_spec: PartitionSpec
) -> Function:
    mapped: Function = jax.shard_map(
        function, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False
    )
    return mapped


def _dim_of_slabs(shape: slabs.Shape, new_shape: slabs.Shape, n_devices: int) -> int:
    """Return the dimension that most devices can cut, counted from the last (-1).

    Of several it is the largest. Both shapes have it: their first ones may stack layers otherwise.
    """
    dims = []
    for dim in range(-1, -min(len(shape), len(new_shape)) - 1, -1):
        if shape[dim] != new_shape[dim]:
            break
        dims.append(dim)
    return max(dims, key=lambda dim: (math.gcd(shape[dim], n_devices), shape[dim]))
