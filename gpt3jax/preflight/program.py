"""The fingerprint of a run's training step: programs that differ are what hangs collectives.

It is taken from the lowering that the first step compiles: JAX keeps it, so nothing is traced or
lowered twice.
"""

import hashlib

import jax

from gpt3jax import step
from gpt3jax.config import schema


def fingerprint(program: step.Program, cfg: schema.Config, batch_size: int) -> str:
    """Return the length and the digest of the step's program for batches of this size."""
    with jax.set_mesh(program.mesh):
        args = step.abstract_args(program, cfg, batch_size)
        text = program.train.jitted.lower(*args).as_text()
    return f"{len(text):,} characters, digest {hashlib.sha256(text.encode()).hexdigest()[:12]}"
