"""The lookup of a table's rows and its gradient, written out over the mesh.

It is not left to XLA's partitioner: for a table that `fsdp` and `tensor` cut, in a region that is
manual over `data`, jaxlib 0.11 and 0.12 abort the process on the gather. So each device gathers the
columns of its own rows, looks up the ids that stand in these rows, and sums the result with that of
the other devices. The backward pass adds gradients to a device's own rows, and sums likewise.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from gpt3jax.sharding import rules

Axes = tuple[str | None, str | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def rows(table_axes: Axes, out_axes: Axes, table_VD: Array, ids_BT: Array) -> Array:
    """Return `table[ids]`, `[B, T, D]` with D whole; its gradient is summed in the table's format.

    `table_axes` are the logical axes of the table, `out_axes` the axes of the result's first two
    dimensions. Where one mesh axis cuts both the table's rows and the result's positions
    (sequence parallelism), each device gets the sums for its own positions only.
    """
    row_axes, column_axes = map(rules.axes_in_use, table_axes)
    position_axes = rules.axes_in_use(out_axes[1])

    def local(table: Array, ids: Array) -> Array:
        for axis in column_axes:
            table = jax.lax.all_gather(table, axis, axis=1, tiled=True)
        place, served = _places(row_axes, ids, table.shape[0])
        x = jnp.where(served[..., None], table[place], 0)
        for axis in row_axes:
            if axis in position_axes:
                x = jax.lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True)
            else:
                x = jax.lax.psum(x, axis)
        return x

    in_axes: list[tuple[str | None, ...]] = [table_axes, _id_axes(table_axes, out_axes)]
    return rules.map_shards(local, in_axes, (*out_axes, None))(table_VD, ids_BT)


def _forward(
    table_axes: Axes, out_axes: Axes, table_VD: Array, ids_BT: Array
) -> tuple[Array, tuple[Array, Array]]:
    # The backward pass reads only the table's shape, so no copy of it is kept.
    return rows(table_axes, out_axes, table_VD, ids_BT), (table_VD, ids_BT)


def _backward(
    table_axes: Axes, out_axes: Axes, residuals: tuple[Array, Array], d_x_BTD: Array
) -> tuple[Array, None]:
    row_axes, column_axes = map(rules.axes_in_use, table_axes)
    position_axes = rules.axes_in_use(out_axes[1])
    id_axes = _id_axes(table_axes, out_axes)
    cut_ids = [axis for logical in id_axes for axis in rules.axes_in_use(logical)]
    sum_axes = tuple(axis for axis in cut_ids if axis not in column_axes)
    n_own = residuals[0].shape[0] // rules.n_ways(table_axes[0])

    def local(ids: Array, d_x: Array) -> Array:
        for axis in row_axes:
            if axis in position_axes:
                d_x = jax.lax.all_gather(d_x, axis, axis=1, tiled=True)
        place, served = _places(row_axes, ids, n_own)
        d_table = _sum_by_id(jnp.where(served, place, n_own), d_x, n_own)
        for axis in column_axes:
            # Each device has the columns' gradient of its own part of the batch.
            d_table = jax.lax.psum_scatter(d_table, axis, scatter_dimension=1, tiled=True)
        return jax.lax.psum(d_table, sum_axes) if sum_axes else d_table

    mapped = rules.map_shards(local, [id_axes, (*out_axes, None)], table_axes)
    return mapped(residuals[1], d_x_BTD), None


rows.defvjp(_forward, _backward)


def _sum_by_id(ids_BT: Array, x_BTD: Array, n_ids: int) -> Array:
    """Return `[n_ids, D]`: for each id the sum of its values, in fp32 before it is rounded.

    There is no scatter: on a GPU it adds by atomics, in an order that varies. Values are sorted by
    their ids, a segmented scan adds up those of each id, and the last has the sum.
    """
    ids_N = ids_BT.reshape(-1)
    # By id and place. With a single key XLA would sort by a library that it asks for a GPU's answer
    # while it compiles, and plans have none.
    sorted_N, order_N = jax.lax.sort((ids_N, jnp.arange(ids_N.size)), num_keys=2)
    x_ND = x_BTD.reshape(ids_N.size, -1)[order_N].astype(jnp.float32)
    starts_N1 = jnp.concatenate([jnp.ones(1, bool), sorted_N[1:] != sorted_N[:-1]])[:, None]

    def add(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        starts = left[0] | right[0]
        return starts, jnp.where(right[0], 0, left[1]) + right[1]

    _, sums_ND = jax.lax.associative_scan(add, (starts_N1, x_ND))
    ids_V = jnp.arange(n_ids)
    last_V = jnp.searchsorted(sorted_N, ids_V, side="right") - 1
    found_V1 = (sorted_N[last_V] == ids_V)[:, None]  # -1 is the last place, whose id is none here
    return jnp.where(found_V1, sums_ND[last_V], 0).astype(x_BTD.dtype)


def _id_axes(table_axes: Axes, out_axes: Axes) -> Axes:
    """Return the axes of the ids: a device needs all ids that may stand in its rows."""
    row_axes, position_axes = rules.axes_in_use(table_axes[0]), rules.axes_in_use(out_axes[1])
    return (out_axes[0], "seq") if set(row_axes) & set(position_axes) else out_axes


def _places(row_axes: tuple[str, ...], ids: Array, n_own: int) -> tuple[Array, Array]:
    """Return where ids stand in a device's own rows (0 if elsewhere), and whether they do."""
    first = jax.lax.axis_index(row_axes) * n_own if row_axes else 0
    place = ids - first
    served = (place >= 0) & (place < n_own)
    return jnp.where(served, place, 0), served
