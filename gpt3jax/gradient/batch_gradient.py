"""The mean loss of a batch and its gradient, over all microbatches, replicas and stages."""

import functools

import jax
import jax.numpy as jnp

from gpt3jax.config import schema
from gpt3jax.data import global_batch
from gpt3jax.gradient import accumulation, pipeline
from gpt3jax.model import gpt, loss
from gpt3jax.sharding import layouts, replica_sums, sequence

_NOISE = 0x64726F70  # sets dropout's keys apart from those of the initial weights


def mean_loss_and_grads(
    cfg: schema.Config,
    compute: gpt.Compute,
    params: gpt.GPT,
    loss_scale: jax.Array,
    batch: global_batch.Batch,
) -> tuple[jax.Array, gpt.GPT]:
    """Return the mean token loss of a batch and its gradient in fp32, without the loss scale.

    Each replica adds up the gradients of its microbatches by itself. They are summed over the
    replicas once, at the end, and not in every layer of every microbatch.
    """
    weights_MBT = loss_scale * loss.token_weights(
        batch["loss_mask"], cfg.train.loss_mean, cfg.batch.microbatch_size
    )
    noise_key = jax.random.fold_in(jax.random.key(cfg.train.seed), _NOISE)
    used = params_to_use(cfg, params)
    local = functools.partial(accumulation.loss_and_grad_sums, noise_key=noise_key, compute=compute)
    if pipeline.is_in_use():
        local = functools.partial(
            pipeline.loss_and_grad_sums,
            noise_key=noise_key,
            compute=compute,
            virtual_stages=cfg.mesh.virtual_stages,
        )
    on_replicas = replica_sums.sum_grads_on_replicas
    if cfg.mesh.shard_optimizer:
        on_replicas = replica_sums.scatter_grads_on_replicas
    sharded = sequence.shard_sequence({**batch, "weights": weights_MBT})
    loss_sum, grads = on_replicas(local, used)(used, sharded)
    n_tokens = jnp.maximum(batch["loss_mask"].sum(dtype=jnp.float32), 1)
    return loss_sum / n_tokens, jax.tree.map(lambda g: g / loss_scale, grads)


def loss_sum_and_tokens(
    cfg: schema.Config, compute: gpt.Compute, params: gpt.GPT, batch: global_batch.Batch
) -> tuple[jax.Array, jax.Array]:
    """Return the summed loss and the number of tokens of a batch, without dropout."""
    used = params_to_use(cfg, params)
    local = functools.partial(accumulation.loss_sum, compute=compute)
    if pipeline.is_in_use():
        local = functools.partial(
            pipeline.loss_sum, compute=compute, virtual_stages=cfg.mesh.virtual_stages
        )
    weights_MBT = batch["loss_mask"].astype(jnp.float32)
    sharded = sequence.shard_sequence({**batch, "weights": weights_MBT})
    loss_sum = replica_sums.sum_on_replicas(local, used)(used, sharded)
    return loss_sum, batch["loss_mask"].sum(dtype=jnp.float32)


def params_to_use(cfg: schema.Config, params: gpt.GPT) -> gpt.GPT:
    """Return parameters as the network takes them, made once a step where that saves work.

    Where parameters are sharded over `data` (ZeRO-1), each replica gets them whole. There, and
    for pipeline stages, which use them at every tick, the matrices of layers are cast first. The
    model uses these in the compute format alone, so this changes no number.
    """
    if not (cfg.mesh.shard_optimizer or pipeline.is_in_use()):
        return params

    def cast(variable: layouts.Variable) -> layouts.Variable:
        is_cast = layouts.is_of_layers(variable) and variable.get_metadata("decays")
        dtype = cfg.precision.compute_dtype if is_cast else jnp.float32
        return jax.tree.map(lambda x: x.astype(dtype), variable)

    # Without the barrier XLA may gather first, twice the bytes, and cast then.
    used = jax.lax.optimization_barrier(layouts.map_variables(cast, params))
    return layouts.constrain_like_params(used)
