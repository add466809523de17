"""The mesh and the one table that maps logical axes to mesh axes.

Parameters declare logical axes where they are made (`model`), activations where they are used
(`constrain`); `state_shardings` turns the declarations into the layout of a whole train state,
optimizer included. No other file names a mesh axis to lay out arrays or to communicate, but for
`stage` in `pipeline` and `stacking`; others ask for an axis's size, and `plan` reckons with all.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
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

# [microbatch, batch, ...]; `shard_sequence` cuts the sequence once the batch is on the devices.
BATCH_SPEC = PartitionSpec(None, ("data", "fsdp"))
_HEADS = ("heads", "head_dim")


def make_mesh(mesh: config.Mesh) -> jax.sharding.Mesh:
    """Return the mesh over all devices of all processes, -1 resolved.

    Raises:
        UserError: the axes' product is not the number of devices.
    """
    n_devices = jax.device_count()
    sizes = axis_sizes(mesh, n_devices)
    if sizes is None:
        told = " x ".join(f"{a} {getattr(mesh, a)}" for a in AXES)
        raise config.UserError(
            f"mesh: {told} does not fit {n_devices} {jax.default_backend()} device(s): the axes' "
            f"product must be {n_devices}; change one, give -1 to one, or start more devices"
        )
    return jax.make_mesh(list(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(mesh: config.Mesh, n_devices: int) -> dict[str, int] | None:
    """Return the axes' sizes on so many devices, -1 resolved; None if their product is another."""
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1 and n_devices % fixed == 0:
            sizes[axis] = n_devices // fixed
    return sizes if math.prod(sizes.values()) == n_devices else None


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


def context_size() -> int:
    """Return how many ways the sequence is split; 1 where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(mesh.shape["context"])


def chunk_starts(n_positions: int) -> np.ndarray:
    """Return `[C, R]`: where the R chunks of consecutive positions start that each shard holds.

    Of 2 C chunks shard c holds c and 2 C - 1 - c, an early and a late one: so each has as much
    to do under a causal mask. Without context parallelism it is one chunk that starts at 0.
    """
    c = context_size()
    if c == 1:
        return np.zeros((1, 1), np.int32)
    early = np.arange(c, dtype=np.int32)
    return np.stack([early, 2 * c - 1 - early], axis=1) * np.int32(n_positions // (2 * c))


def sequence_order(n_positions: int) -> Any:
    """Return which place of the sequence stands at each position of an array `[B, T, ...]`."""
    starts_CR = chunk_starts(n_positions)
    chunk_T = jnp.arange(n_positions // starts_CR.size)
    return (jnp.asarray(starts_CR)[..., None] + chunk_T).ravel()


def shard_sequence(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch whose arrays `[M, B, T]` are in `sequence_order`, sharded over `context`."""
    if context_size() == 1:
        return batch

    def one(x: Any) -> Any:
        return constrain(_in_shard_order(x), None, "batch", "seq")

    return {name: one(x) if x.ndim == 3 else x for name, x in batch.items()}


def _in_shard_order(x: Any) -> Any:
    """Return an array `[..., T]` in `sequence_order`."""
    chunks = x.reshape(*x.shape[:-1], 2 * context_size(), -1)
    early, late = jnp.split(chunks, 2, axis=-2)
    return jnp.stack([early, late[..., ::-1, :]], axis=-2).reshape(x.shape)


def stretch_starts(n_positions: int, n_before: int) -> np.ndarray:
    """Return `[C, R]`: where `gather_stretches` starts, `n_before` positions before each chunk.

    All stretches have one length: near the start of the sequence they reach further instead.
    """
    starts_CR = chunk_starts(n_positions)
    n = min(n_positions, n_positions // starts_CR.size + n_before)
    return np.clip(starts_CR - n_before, 0, n_positions - n)


def split_sequence(tree: Any) -> Any:
    """Give arrays `[B, T, ...]` a dimension for the shards of their sequence: `[B, C, T / C, ...]`.

    What is done for each shard of that dimension is done by the devices that hold it.
    """
    n_shards = context_size()

    def one(x: Any) -> Any:
        x = x.reshape(x.shape[0], n_shards, -1, *x.shape[2:])
        return constrain(x, "batch", "seq", None, *_HEADS[: x.ndim - 3])

    return jax.tree.map(one, tree)


def gather_sequence(tree: Any) -> Any:
    """Give each shard arrays `[B, T, ...]` whole, in their true order: `[B, C, T, ...]`.

    The copies make the gradient's sum over shards one sum, at the end.
    """
    n_shards = context_size()

    def one(x: Any) -> Any:
        copies = jnp.broadcast_to(x[:, None], (x.shape[0], n_shards, *x.shape[1:]))
        copies = constrain(copies, "batch", "seq", None, *_HEADS[: x.ndim - 2])
        return _in_true_order(copies.reshape(-1, *x.shape[1:])).reshape(copies.shape)

    return jax.tree.map(one, tree)


def gather_stretches(tree: Any, n_before: int) -> Any:
    """Give each chunk of arrays `[B, T, ...]` what leads up to it as well: `[B, C, R, S, ...]`."""

    def one(x: Any) -> Any:
        starts_CR = stretch_starts(x.shape[1], n_before)
        n = x.shape[1] - int(starts_CR.max())
        x = _in_true_order(constrain(x, "batch", None, *_HEADS[: x.ndim - 2]))
        stretches = jnp.stack([x[:, i : i + n] for i in starts_CR.ravel().tolist()], axis=1)
        # Whole on each device at first: one gather, and each keeps its own part.
        stretches = constrain(stretches, "batch", None, None, *_HEADS[: x.ndim - 2])
        stretches = stretches.reshape(x.shape[0], *starts_CR.shape, *stretches.shape[2:])
        return constrain(stretches, "batch", "seq", None, None, *_HEADS[: x.ndim - 2])

    return jax.tree.map(one, tree)


def _in_true_order(x: Any) -> Any:
    """Undo `sequence_order` on an array `[B, T, ...]`."""
    chunks = x.reshape(x.shape[0], context_size(), 2, -1, *x.shape[2:])
    halves = chunks[:, :, 0], chunks[:, ::-1, 1]
    return jnp.concatenate(halves, axis=1).reshape(x.shape)


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


def array_names(tree: Any) -> list[str]:
    """Return the name of each array of a tree of variables, as `blocks/mlp/w_in_DF`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return [name.removesuffix("/value") for name in names]


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


def data_dim(variable: nnx.Variable[Any], mesh: Any) -> int | None:
    """Return which dimension of a parameter `data` cuts where it shards the optimizer.

    The largest that it divides and no other axis cuts; None if there is none, as in small vectors.
    """
    n_data = mesh.shape["data"]
    best, dim = 0, None
    for i, axis in enumerate(variable_axes(variable)):
        size = variable.get_value().shape[i]
        if size > best and size % n_data == 0 and all(mesh.shape[a] == 1 for a in RULES[axis]):
            best, dim = size, i
    return dim


def _with_data(specification: PartitionSpec, dim: int | None) -> PartitionSpec:
    entries = list(specification)
    if dim is not None:
        entries[dim] = "data"
    return PartitionSpec(*entries)


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
        if not is_variable(node):
            return PartitionSpec()
        dim = data_dim(node, mesh) if over_data else None
        specification = spec(variable_axes(node), frozenset(AXES) - manual)
        return jax.tree.map(lambda _: _with_data(specification, dim), node)

    def add_up(node: Any) -> Any:
        of_stage = is_variable(node) and "layers" in variable_axes(node)
        dim = None
        if is_variable(node) and shard_grads:
            dim = data_dim(node, jax.sharding.get_abstract_mesh())
        if dim is None:
            return jax.lax.psum(node, "data" if of_stage else ("data", "stage"))
        if not of_stage:
            node = jax.lax.psum(node, "stage")
        # All axes manual: left to the partitioner, it would gather the gradient first.
        scatter = functools.partial(
            jax.lax.psum_scatter, axis_name="data", scatter_dimension=dim, tiled=True
        )
        axes = variable_axes(node)
        return jax.tree.map(map_shards(scatter, [axes], axes), node)

    specs = jax.tree.map(local_spec, params, is_leaf=is_variable)
    grad_specs = jax.tree.map(
        functools.partial(local_spec, over_data=shard_grads), params, is_leaf=is_variable
    )
    summed: Any = jax.shard_map(
        lambda *args: jax.tree.map(add_up, function(*args), is_leaf=is_variable),
        in_specs=(specs, PartitionSpec(None, "data")),
        out_specs=(PartitionSpec(), grad_specs) if has_grads else PartitionSpec(),
        axis_names=manual,
        check_vma=False,
    )
    return summed(params, batch)


def state_shardings(abstract_state: Any, mesh: jax.sharding.Mesh, over_data: bool = False) -> Any:
    """Return the NamedSharding of every leaf of a state: parameters, moments, counters.

    Used for init, for the step and as the restore target. Plain arrays are replicated. With
    `over_data`, parameters and moments are cut by `data` too (`data_dim`).

    Raises:
        UserError: a dimension that its mesh axes do not divide; it names tensor and numbers.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def one(path: Any, node: Any) -> Any:
        if not is_variable(node):
            return replicated
        axes = variable_axes(node)
        _check_divides(jax.tree_util.keystr(path, simple=True, separator="/"), node, axes, mesh)
        specification = _with_data(spec(axes), data_dim(node, mesh) if over_data else None)
        return jax.tree.map(lambda _: NamedSharding(mesh, specification), node)

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
