"""The loop over the microbatches of a batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def fold(
    add: Callable[[Any, dict[str, jax.Array]], Any], start: Any, batch: dict[str, jax.Array]
) -> Any:
    """Return start after `sums = add(sums, microbatch)` for each of the batch `[M, ...]` in turn.

    Not a scan, and how long it runs is hidden from XLA: on GPUs XLA would unroll it by two, and
    then hold what the backward pass needs of two microbatches at once (38 GiB in place of 24 for
    13B on 64 H100). The price: the host reads a number back from the GPU before each microbatch.
    """
    n_microbatches = len(batch["tokens"])

    def body(i: jax.Array | int, sums: Any) -> Any:
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
        return add(sums, jax.tree.map(take, batch))

    if n_microbatches == 1:
        return body(0, start)
    end = jax.lax.optimization_barrier(jnp.int32(n_microbatches))
    return jax.lax.fori_loop(jnp.int32(0), end, body, start)
