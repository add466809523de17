"""Sums over the microbatches of a batch, one microbatch after the other."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from gpt3jax.data import global_batch
from gpt3jax.model import dropout, gpt, loss
from gpt3jax.sharding import layouts

Sums = TypeVar("Sums")


def loss_and_grad_sums(
    params: gpt.GPT, batch: global_batch.Batch, noise_key: jax.Array, compute: gpt.Compute
) -> tuple[jax.Array, gpt.GPT]:
    """Return the summed token losses of a batch and the gradient of its weighted loss, fp32."""
    grad = jax.value_and_grad(microbatch_loss, has_aux=True)

    def add(i: jax.Array | int, sums: tuple[jax.Array, gpt.GPT]) -> tuple[jax.Array, gpt.GPT]:
        microbatch = global_batch.microbatch(batch, i)
        noise = dropout.Noise(noise_key, microbatch["samples"])
        (_, loss_sum), grads = grad(params, microbatch, noise, compute)
        grad_sums = jax.tree.map(jnp.add, sums[1], grads)
        return sums[0] + loss_sum, layouts.constrain_like_params(grad_sums)

    return _fold(add, (jnp.float32(0), layouts.zeros_like_params(params)), batch)


def loss_sum(params: gpt.GPT, batch: global_batch.Batch, compute: gpt.Compute) -> jax.Array:
    """Return the summed token losses of a batch, without dropout."""

    def add(i: jax.Array | int, total: jax.Array) -> jax.Array:
        return total + microbatch_loss(params, global_batch.microbatch(batch, i), None, compute)[1]

    return _fold(add, jnp.float32(0), batch)


def microbatch_loss(
    params: gpt.GPT,
    microbatch: global_batch.Batch,
    noise: dropout.Noise | None,
    compute: gpt.Compute,
) -> tuple[jax.Array, jax.Array]:
    """Return the weighted loss of `[B, T]` tokens, to differentiate, and their summed loss."""
    cfg = params.model
    x_BTD = params(
        microbatch["tokens"], microbatch["positions"], microbatch.get("segments"), noise, compute
    )
    weighted, token_losses_BT = loss.cross_entropy(
        x_BTD,
        params.head_VD(compute),
        microbatch["targets"],
        microbatch["weights"],
        cfg.softmax_size,
        cfg.n_loss_chunks,
    )
    return weighted, (token_losses_BT * microbatch["loss_mask"]).sum()


def _fold(
    add: Callable[[jax.Array | int, Sums], Sums], start: Sums, batch: global_batch.Batch
) -> Sums:
    """Return `start` after `sums = add(i, sums)` for each microbatch i of a batch in turn.

    This is no scan, and XLA does not see the number of microbatches. On GPUs XLA would unroll the
    loop by two and hold what the backward pass needs of two microbatches at once (38 GiB in place
    of 24 for 13B on 64 H100). The price: the host reads a number from the GPU before each one.
    """
    n_microbatches = len(batch["tokens"])
    if n_microbatches == 1:
        return add(0, start)
    end = jax.lax.optimization_barrier(jnp.int32(n_microbatches))
    return jax.lax.fori_loop(jnp.int32(0), end, add, start)
