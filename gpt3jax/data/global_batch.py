"""The batch of a step: its arrays, their shapes, and the rows that each process holds.

A batch is a dict of global arrays `[M, B, ...]` (microbatches, sequences): `tokens, targets,
loss_mask, positions` `[M, B, T]`, `samples` `[M, B]` (numbers in the run), and `segments` where
documents are hidden from each other.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gpt3jax.config import schema
from gpt3jax.sharding import rules


def abstract_batch(
    cfg: schema.Config, mesh: jax.sharding.Mesh, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch `[M, B, ...]`, as the loader lays it on the devices."""
    n_rows = cfg.batch.microbatch_size * rules.data_parallel_size(mesh)
    rows = batch_size // n_rows, n_rows
    tokens = (*rows, cfg.model.seq_len)
    shapes: dict[str, Any] = dict.fromkeys(("tokens", "targets", "positions"), (tokens, jnp.int32))
    shapes |= {"loss_mask": (tokens, jnp.float32), "samples": (rows, jnp.int32)}
    if cfg.data.reset_attention_mask:
        shapes["segments"] = (tokens, jnp.int32)
    layout = NamedSharding(mesh, rules.BATCH_SPEC)
    return {name: jax.ShapeDtypeStruct(*of, sharding=layout) for name, of in shapes.items()}


def local_rows(mesh: jax.sharding.Mesh, n_rows: int) -> np.ndarray:
    """Return which of the n_rows rows of a microbatch this process's devices hold, in order."""
    index = NamedSharding(mesh, rules.BATCH_SPEC).addressable_devices_indices_map((1, n_rows))
    spans = {slices[1].indices(n_rows)[:2] for slices in index.values() if slices}
    return np.concatenate([np.arange(*span) for span in sorted(spans)])


def device_put_rows(local: Any, mesh: jax.sharding.Mesh, n_rows: int) -> Any:
    """Join each process's rows `[M, local rows, ...]` to global arrays `[M, n_rows, ...]`."""
    sharding = NamedSharding(mesh, rules.BATCH_SPEC)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(
            sharding, x, (x.shape[0], n_rows, *x.shape[2:])
        ),
        local,
    )


Batch = dict[str, jax.Array]
