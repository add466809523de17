"""The mean loss of a batch and its gradient, over all microbatches, replicas and stages."""

from typing import Any

import jax
import jax.numpy as jnp

from gpt3jax.config import schema
from gpt3jax.data import global_batch
from gpt3jax.gradient import accumulation, pipeline
from gpt3jax.model import dropout, gpt, loss
from gpt3jax.sharding import layouts, replicas, sequence

_NOISE = 0x64726F70  # sets dropout's keys apart from those of the initial weights


def mean_loss_and_grads(
    cfg: schema.Config,
    compute: gpt.Compute,
    params: gpt.GPT,
    scale: jax.Array,
    batch: global_batch.Batch,
) -> tuple[jax.Array, Any]:
    """Return the batch's mean token loss and the fp32 gradient, unscaled.

    `scale` is the loss scale that products of the backward pass see.

    Each replica of the `data` axis sums the gradients of its microbatches alone; they are added
    up over the replicas once, at the end, and not in every layer of every microbatch.
    """
    weights_MBT = scale * loss.token_weights(
        batch["loss_mask"], cfg.train.loss_mean, cfg.batch.microbatch_size
    )
    noise_key = jax.random.fold_in(jax.random.key(cfg.train.seed), _NOISE)

    def one(params: gpt.GPT, microbatch: global_batch.Batch) -> tuple[jax.Array, jax.Array]:
        noise = dropout.Noise(noise_key, microbatch["samples"])
        return microbatch_loss(params, microbatch, noise, compute)

    def pipelined_sums(params: gpt.GPT, batch: global_batch.Batch) -> Any:
        def weighted(params: gpt.GPT, sums: Any) -> tuple[jax.Array, jax.Array]:
            rounds = cfg.mesh.virtual_stages
            return pipeline.batch_loss(params, batch, noise_key, compute, rounds, sums)

        grad = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)
        zeros = layouts.constrain_like_params(_zeros_like(params.blocks))
        (_, loss_sum), (grads, of_blocks) = grad(params, zeros)
        grads.blocks = of_blocks
        return loss_sum, layouts.constrain_like_params(grads)

    def local_sums(params: gpt.GPT, batch: global_batch.Batch) -> Any:
        grad = jax.value_and_grad(one, has_aux=True)

        def add(sums: Any, microbatch: global_batch.Batch) -> Any:
            (_, loss_sum), grads = grad(params, microbatch)
            grads = jax.tree.map(jnp.add, sums[1], grads)
            return sums[0] + loss_sum, layouts.constrain_like_params(grads)

        start = (jnp.float32(0), layouts.constrain_like_params(_zeros_like(params)))
        return accumulation.fold(add, start, batch)

    parts = sequence.shard_sequence({**batch, "weights": weights_MBT})
    sums = pipelined_sums if is_pipelined() else local_sums
    loss_sum, grads = replicas.sum_over_replicas(
        sums, params_to_use(cfg, params), parts, True, cfg.mesh.shard_optimizer
    )
    n_tokens = jnp.maximum(batch["loss_mask"].sum(dtype=jnp.float32), 1)
    return loss_sum / n_tokens, jax.tree.map(lambda g: g / scale, grads)


def params_to_use(cfg: schema.Config, params: gpt.GPT) -> gpt.GPT:
    """Return parameters as the network takes them, made once a step where that saves work.

    Where they are sharded over `data` (ZeRO-1) each replica gets them whole. The matrices of layers
    are cast first, there and for pipeline stages, which use them at every tick: the model takes
    them in the compute format alone, so this changes no number.
    """
    if not (cfg.mesh.shard_optimizer or is_pipelined()):
        return params

    def one(variable: Any) -> Any:
        of_layers = "layers" in layouts.variable_axes(variable)
        cast = of_layers and variable.get_metadata("decays")
        dtype = cfg.precision.compute_dtype if cast else jnp.float32
        return jax.tree.map(lambda x: x.astype(dtype), variable)

    # Without the barrier XLA may gather first, twice the bytes, and cast then.
    cast = jax.lax.optimization_barrier(jax.tree.map(one, params, is_leaf=layouts.is_variable))
    return layouts.constrain_like_params(cast)


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


def _zeros_like(params: Any) -> Any:
    """Return fp32 zeros in the shapes of parameters: what gradients are added to."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def is_pipelined() -> bool:
    """Tell whether the layers are cut over pipeline stages here."""
    return jax.sharding.get_abstract_mesh().shape["stage"] > 1
