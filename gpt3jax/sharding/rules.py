"""The one table that maps logical axes to mesh axes, and the layout of activations by it.

Parameters declare logical axes where they are made (`model.gpt`), activations where they are used
(`constrain`). Only this room names mesh axes to lay out arrays or to communicate, apart from
`stage` in `gradient.pipeline` and `checkpoint.layer_stacking`. Other rooms ask for an axis's size.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
from jax.sharding import PartitionSpec

Axes: TypeAlias = tuple[str | None, ...]
Function: TypeAlias = Callable[..., jax.Array]

RULES: dict[str | None, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "seq": ("context",),
    "seq_shard": ("context", "tensor"),  # norm, dropout and residual under sequence parallelism
    # parameters
    "embed": ("fsdp",),
    "layers": ("stage",),
    # both
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "head_dim": (),
    None: (),
}

# [microbatch, batch, ...]; `sequence.shard_sequence` cuts the sequence later, on the devices.
BATCH_SPEC = PartitionSpec(None, ("data", "fsdp"))


def data_parallel_size(mesh: jax.sharding.Mesh) -> int:
    """Return into how many parts a batch is split: Megatron's data-parallel size."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def spec(logical_axes: Axes, manual: frozenset[str] = frozenset()) -> PartitionSpec:
    """Return the PartitionSpec of logical axes, leaving out mesh axes that are manual here."""
    entries = [tuple(a for a in RULES[axis] if a not in manual) for axis in logical_axes]
    used = [a for entry in entries for a in entry]
    assert len(used) == len(set(used)), f"{logical_axes}: two dimensions on one mesh axis"
    return PartitionSpec(*(entry or None for entry in entries))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Fix the layout of an activation. Without a mesh, as in plain unit tests, do nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical_axes, frozenset(mesh.manual_axes)))


def axes_in_use(logical_axis: str | None) -> tuple[str, ...]:
    """Return the mesh axes that cut a logical axis here: those above 1 that are not manual."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    axes = RULES[logical_axis]
    return tuple(a for a in axes if mesh.shape[a] > 1 and a not in mesh.manual_axes)


def n_ways(logical_axis: str | None) -> int:
    """Return into how many parts a logical axis is cut here."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[a] for a in axes_in_use(logical_axis))


def map_shards(function: Function, in_axes: Sequence[Axes], out_axes: Axes) -> Function:
    """Return a function that runs `function` on each device's own part of the arguments.

    It serves kernels that the partitioner cannot split, such as cuDNN's attention. Without a mesh
    it is the function itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    manual = frozenset(mesh.manual_axes)
    mapped: Function = jax.shard_map(
        function,
        in_specs=tuple(spec(axes, manual) for axes in in_axes),
        out_specs=spec(out_axes, manual),
        axis_names=set(mesh.axis_names) - manual,
        check_vma=False,
    )
    return mapped
