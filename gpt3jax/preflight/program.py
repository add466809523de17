"""The fingerprint of a run's training step: programs that differ are what hangs collectives.

It is taken from the lowering that the first step compiles: JAX keeps it, so nothing is traced or
lowered twice.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from gpt3jax import config, faults, sharding, step


def fingerprint(program: step.Program, cfg: config.Config, batch_size: int) -> str:
    """Return the length and the digest of the step's program for batches of this size."""
    with jax.set_mesh(program.mesh):
        args = abstract_args(program, cfg, batch_size)
        text = program.train.jitted.lower(*args).as_text()
    return f"{len(text):,} characters, digest {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def abstract_args(program: step.Program, cfg: config.Config, batch_size: int) -> tuple[Any, ...]:
    """Return what the training step takes in a run, for batches of this size, as shapes.

    What skips spikes is a number, taken from where the loop takes it.
    """
    batch = abstract_batch(cfg, program.mesh, batch_size)
    return program.abstract_state, batch, *faults.Faults(cfg, ()).step_args(1)


def abstract_batch(
    cfg: config.Config, mesh: jax.sharding.Mesh, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch `[M, B, ...]`, as the loader lays it on the devices."""
    n_rows = cfg.batch.microbatch_size * sharding.data_parallel_size(mesh)
    rows = batch_size // n_rows, n_rows
    tokens = (*rows, cfg.model.seq_len)
    shapes: dict[str, Any] = dict.fromkeys(("tokens", "targets", "positions"), (tokens, jnp.int32))
    shapes |= {"loss_mask": (tokens, jnp.float32), "samples": (rows, jnp.int32)}
    if cfg.data.reset_attention_mask:
        shapes["segments"] = (tokens, jnp.int32)
    layout = NamedSharding(mesh, sharding.BATCH_SPEC)
    return {name: jax.ShapeDtypeStruct(*of, sharding=layout) for name, of in shapes.items()}
