"""The mesh and the one table that maps logical axes to mesh axes.

Parameters declare logical axes where they are made (`model`), activations where they are used
(`constrain`); `state_shardings` turns the declarations into the layout of a whole train state,
optimizer included. No other file names a mesh axis to lay out arrays or to communicate, but for
`stage` in `pipeline` and `stacking`; others ask for an axis's size, and `plan` reckons with all.
"""

import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

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

# [microbatch, batch, ...]; `shard_sequence` cuts the sequence once the batch is on the devices.
BATCH_SPEC = PartitionSpec(None, ("data", "fsdp"))


def data_parallel_size(mesh: jax.sharding.Mesh) -> int:
    """Return how many ways a batch is split: Megatron's data-parallel size."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def spec(logical_axes: tuple[str | None, ...], manual: frozenset[str] = frozenset()) -> Any:
    """Return the PartitionSpec of logical axes, without mesh axes that are already manual."""
    entries = [tuple(a for a in RULES[axis] if a not in manual) for axis in logical_axes]
    used = [a for entry in entries for a in entry]
    assert len(used) == len(set(used)), f"{logical_axes}: two dimensions on one mesh axis"
    return PartitionSpec(*(entry or None for entry in entries))


def constrain(x: Any, *logical_axes: str | None) -> Any:
    """Fix the layout of an activation; where no mesh is set (plain unit tests), leave it alone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical_axes, frozenset(mesh.manual_axes)))


def axes_in_use(logical_axis: str | None) -> tuple[str, ...]:
    """Return the mesh axes that cut a logical axis here: larger than 1, and not manual already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    axes = RULES[logical_axis]
    return tuple(a for a in axes if mesh.shape[a] > 1 and a not in mesh.manual_axes)


def n_ways(logical_axis: str | None) -> int:
    """Return how many ways a logical axis is cut here."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[a] for a in axes_in_use(logical_axis))


def map_shards(
    function: Any, in_axes: list[tuple[str | None, ...]], out_axes: tuple[str | None, ...]
) -> Any:
    """Return the function made to run on each device's own part of its arguments.

    For kernels that the partitioner cannot split, such as cuDNN's attention. Without a mesh it is
    the function itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    manual = frozenset(mesh.manual_axes)
    return jax.shard_map(
        function,
        in_specs=tuple(spec(axes, manual) for axes in in_axes),
        out_specs=spec(out_axes, manual),
        axis_names=set(mesh.axis_names) - manual,
        check_vma=False,
    )
