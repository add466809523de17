"""The batch of a step: its arrays, their shapes, and the rows that each process holds.

A batch is a dict of global arrays `[M, B, ...]` (microbatches, rows of each): `tokens`, `targets`,
`loss_mask` and `positions` `[M, B, T]`, `samples` `[M, B]` (numbers in the run), and `segments`
`[M, B, T]` where documents are hidden from each other. Its arithmetic stands here and nowhere else.
"""

from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gpt3jax.config import schema
from gpt3jax.sharding import rules

Batch: TypeAlias = dict[str, jax.Array]


def rows_per_microbatch(cfg: schema.Config, mesh: jax.sharding.Mesh) -> int:
    """Return how many sequences all devices have at once: B."""
    return cfg.batch.microbatch_size * rules.data_parallel_size(mesh)


def n_microbatches(cfg: schema.Config, mesh: jax.sharding.Mesh, batch_size: int) -> int:
    """Return how many microbatches a batch of so many sequences has: M."""
    return batch_size // rows_per_microbatch(cfg, mesh)


def abstract(
    cfg: schema.Config, mesh: jax.sharding.Mesh, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch, laid out on the devices as the loader does it."""
    rows = n_microbatches(cfg, mesh, batch_size), rows_per_microbatch(cfg, mesh)
    tokens = (*rows, cfg.model.seq_len)
    shapes = {
        "tokens": (tokens, jnp.int32),
        "targets": (tokens, jnp.int32),
        "positions": (tokens, jnp.int32),
        "loss_mask": (tokens, jnp.float32),
        "samples": (rows, jnp.int32),
    }
    if cfg.data.reset_attention_mask:
        shapes["segments"] = (tokens, jnp.int32)
    layout = NamedSharding(mesh, rules.BATCH_SPEC)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
        for name, (shape, dtype) in shapes.items()
    }


def microbatch(batch: Batch, i: jax.Array | int) -> Batch:
    """Return microbatch i of a batch: arrays `[B, ...]`."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)


def local_rows(mesh: jax.sharding.Mesh, n_rows: int) -> np.ndarray:
    """Return which of the n_rows rows of a microbatch this process's devices hold, in order."""
    index = NamedSharding(mesh, rules.BATCH_SPEC).addressable_devices_indices_map((1, n_rows))
    spans = {slices[1].indices(n_rows)[:2] for slices in index.values() if slices}
    return np.concatenate([np.arange(*span) for span in sorted(spans)])


def device_put_rows(local: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh, n_rows: int) -> Batch:
    """Join each process's rows `[M, local rows, ...]` to global arrays `[M, n_rows, ...]`."""
    layout = NamedSharding(mesh, rules.BATCH_SPEC)
    return {
        name: jax.make_array_from_process_local_data(
            layout, rows, (rows.shape[0], n_rows, *rows.shape[2:])
        )
        for name, rows in local.items()
    }
