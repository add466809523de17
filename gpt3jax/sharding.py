"""The mesh and the one table that maps logical axes to mesh axes.

Parameters declare logical axes where they are made (`model`), activations where they are used
(`constrain`); `state_shardings` turns the declarations into the layout of a whole train state,
optimizer included. Nothing else in the project names a mesh axis, but for `stage` in `pipeline`.
"""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gpt3jax import config

# Slowest network first.
AXES = ("data", "stage", "fsdp", "context", "tensor")

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

BATCH_SPEC = PartitionSpec(None, ("data", "fsdp"))  # [microbatch, batch, ...]


def make_mesh(mesh: config.Mesh) -> jax.sharding.Mesh:
    """Return the mesh over all devices of all processes, -1 resolved.

    Raises:
        UserError: the axes' product is not the number of devices.
    """
    sizes = [getattr(mesh, axis) for axis in AXES]
    n_devices, fixed = jax.device_count(), math.prod(size for size in sizes if size != -1)
    if -1 in sizes and n_devices % fixed == 0:
        sizes[sizes.index(-1)] = n_devices // fixed
    if math.prod(sizes) != n_devices:
        told = " x ".join(f"{a} {getattr(mesh, a)}" for a in AXES)
        raise config.UserError(
            f"mesh: {told} does not fit {n_devices} {jax.default_backend()} device(s): the axes' "
            f"product must be {n_devices}; change one, give -1 to one, or start more devices"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


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


def constrain_like_params(tree: Any) -> Any:
    """Fix each variable of a module-shaped tree (gradients, say) to its parameter's layout."""

    def one(variable: nnx.Variable[Any]) -> Any:
        return jax.tree.map(lambda x: constrain(x, *variable_axes(variable)), variable)

    return jax.tree.map(one, tree, is_leaf=is_variable)


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


def is_variable(node: Any) -> bool:
    """Tell a parameter, moment or gradient with its metadata from a plain array."""
    return isinstance(node, nnx.Variable)


def variable_axes(variable: nnx.Variable[Any]) -> tuple[str | None, ...]:
    """Return the declared logical axes; what stacks layers adds dimensions but no names.

    Layers are stacked as `[L, ...]`, or, of R virtual stages, as `[R, L / R, ...]`.
    """
    axes: tuple[str | None, ...] = variable.get_metadata("axes")
    n_stacked = variable.get_value().ndim - len(axes)
    return ((), ("layers",), (None, "layers"))[n_stacked] + axes


def sum_over_replicas(function: Any, params: Any, batch: Any, has_grads: bool = False) -> Any:
    """Return the global sums of what (params, batch) -> sums gives on a replica or a stage.

    The function runs on each `data` replica's own rows of the batch `[M, B, ...]` and on each
    stage's own layers, manual over these two axes; all else is left to the partitioner. Sums are
    added up over both, once; with `has_grads` they are (sum, gradient like params), and gradients
    of layers stay with their stage.
    """
    manual = frozenset({"data", "stage"})
    shape = jax.sharding.get_abstract_mesh().shape
    if shape["data"] == shape["stage"] == 1:
        return function(params, batch)

    def local_spec(node: Any) -> Any:
        axes = variable_axes(node) if is_variable(node) else ()
        return jax.tree.map(lambda _: spec(axes, frozenset(AXES) - manual), node)

    def add_up(node: Any) -> Any:
        of_stage = is_variable(node) and "layers" in variable_axes(node)
        return jax.lax.psum(node, "data" if of_stage else ("data", "stage"))

    specs = jax.tree.map(local_spec, params, is_leaf=is_variable)
    summed: Any = jax.shard_map(
        lambda *args: jax.tree.map(add_up, function(*args), is_leaf=is_variable),
        in_specs=(specs, PartitionSpec(None, "data")),
        out_specs=(PartitionSpec(), specs) if has_grads else PartitionSpec(),
        axis_names=manual,
        check_vma=False,
    )
    return summed(params, batch)


def state_shardings(abstract_state: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return the NamedSharding of every leaf of a state: parameters, moments, counters.

    Used for init, for the step and as the restore target. Plain arrays are replicated.

    Raises:
        UserError: a dimension that its mesh axes do not divide; it names tensor and numbers.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def one(path: Any, node: Any) -> Any:
        if not is_variable(node):
            return replicated
        axes = variable_axes(node)
        _check_divides(jax.tree_util.keystr(path, simple=True, separator="/"), node, axes, mesh)
        return jax.tree.map(lambda _: NamedSharding(mesh, spec(axes)), node)

    return jax.tree.map_with_path(one, abstract_state, is_leaf=is_variable)


def _check_divides(name: str, variable: Any, axes: Any, mesh: jax.sharding.Mesh) -> None:
    for size, axis in zip(variable.get_value().shape, axes, strict=True):
        ways = math.prod(mesh.shape[a] for a in RULES[axis])
        if size % ways:
            raise config.UserError(
                f"mesh.{'*'.join(RULES[axis])}={ways} does not divide {axis}={size} of {name}: "
                f"use one of {config.divisors(size)}"
            )


def local_rows(mesh: jax.sharding.Mesh, n_rows: int) -> np.ndarray:
    """Return which of the n_rows rows of a microbatch this process's devices hold, in order."""
    index = NamedSharding(mesh, BATCH_SPEC).addressable_devices_indices_map((1, n_rows))
    spans = {slices[1].indices(n_rows)[:2] for slices in index.values() if slices}
    return np.concatenate([np.arange(*span) for span in sorted(spans)])


def device_put_rows(local: Any, mesh: jax.sharding.Mesh, n_rows: int) -> Any:
    """Join each process's rows `[M, local rows, ...]` to global arrays `[M, n_rows, ...]`."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(
            sharding, x, (x.shape[0], n_rows, *x.shape[2:])
        ),
        local,
    )
