"""Next-token cross-entropy, safe and lean on a sharded vocabulary.

Logits exist only for one chunk of the sequence at a time, in fp32, sharded over the vocabulary, and
are never gathered. The forward pass of a training step turns each chunk into gradients at once, so
the backward pass neither keeps nor recomputes logits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from gpt3jax.sharding import rules, sequence

EXCLUDED = -1e30  # the logit of a padded vocabulary entry that is kept out of the softmax


def token_weights(loss_mask_MBT: Array, mean: str, microbatch_size: int) -> Array:
    """Return the weight of each token in the loss that is differentiated; the weights sum to 1.

    With `mean` "tokens" all tokens of the global batch have the same. With "microbatches" the
    loss is Megatron's: the mean of the means within groups of `microbatch_size` sequences, which
    differs where groups have different numbers of tokens.
    """
    mask_MBT = loss_mask_MBT.astype(jnp.float32)
    if mean == "tokens":
        return mask_MBT / jnp.maximum(mask_MBT.sum(), 1)
    n_microbatches, n_rows, n_positions = mask_MBT.shape
    n_groups = n_rows // microbatch_size
    mask_MGBT = mask_MBT.reshape(n_microbatches, n_groups, microbatch_size, n_positions)
    n_tokens_MG11 = jnp.maximum(mask_MGBT.sum((2, 3), keepdims=True), 1)
    return (mask_MGBT / n_tokens_MG11 / (n_microbatches * n_groups)).reshape(mask_MBT.shape)


def logits(x_BTD: Array, embedding_VD: Array, vocab_size: int) -> Array:
    """Return fp32 logits `[B, T, V]`; a softmax gives entries from `vocab_size` on no weight."""
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, embedding_VD, preferred_element_type=jnp.float32)
    logits_BTV = rules.constrain(logits_BTV, "batch", "seq", "vocab")
    if vocab_size == embedding_VD.shape[0]:
        return logits_BTV
    return jnp.where(jnp.arange(embedding_VD.shape[0]) < vocab_size, logits_BTV, EXCLUDED)


def cross_entropy(
    x_BTD: Array,
    embedding_VD: Array,
    targets_BT: Array,
    weights_BT: Array,
    vocab_size: int,
    n_chunks: int,
) -> tuple[Array, Array]:
    """Return sum(weights x token losses), and the token losses `[B, T]`, all fp32.

    The sum has a gradient with respect to x (final hidden states) and the embedding table (the tied
    head); the token losses are for reports and have none. The weights may include the loss scale,
    so that 16-bit gradients of logits do not vanish.
    """
    total, token_losses_BT = _weighted_sum(
        n_chunks, vocab_size, x_BTD, embedding_VD, targets_BT, weights_BT
    )
    return total, jax.lax.stop_gradient(token_losses_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_sum(
    n_chunks: int,
    vocab_size: int,
    x_BTD: Array,
    embedding_VD: Array,
    targets_BT: Array,
    weights_BT: Array,
) -> tuple[Array, Array]:
    def chunk(_: None, part: tuple[Array, Array]) -> tuple[None, Array]:
        x_BUD, targets_BU = part
        return None, _losses(logits(x_BUD, embedding_VD, vocab_size), targets_BU)[0]

    parts = _split(x_BTD, n_chunks), _split(targets_BT, n_chunks)
    token_losses_BT = _join(jax.lax.scan(chunk, None, parts)[1])
    return (token_losses_BT * weights_BT).sum(), token_losses_BT


def _weighted_sum_forward(
    n_chunks: int,
    vocab_size: int,
    x_BTD: Array,
    embedding_VD: Array,
    targets_BT: Array,
    weights_BT: Array,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    def chunk(
        d_embedding_DV: Array, part: tuple[Array, Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        x_BUD, targets_BU, weights_BU = part
        logits_BUV = logits(x_BUD, embedding_VD, vocab_size)
        losses_BU, exp_BUV, sum_BU = _losses(logits_BUV, targets_BU)
        d_logits_BUV = exp_BUV * (weights_BU / sum_BU)[..., None]
        d_logits_BUV -= jnp.where(_hits(logits_BUV, targets_BU), weights_BU[..., None], 0)
        d_logits_BUV = d_logits_BUV.astype(x_BUD.dtype)
        d_x_BUD = jnp.einsum("buv,vd->bud", d_logits_BUV, embedding_VD)
        # [D, V]: the other way round this product takes half as long again on a CPU.
        d_embedding_DV += jnp.einsum(
            "bud,buv->dv", x_BUD, d_logits_BUV, preferred_element_type=jnp.float32
        )
        d_embedding_DV = rules.constrain(d_embedding_DV, "embed", "vocab")
        return d_embedding_DV, (losses_BU, rules.constrain(d_x_BUD, "batch", "seq", None))

    parts = _split(x_BTD, n_chunks), _split(targets_BT, n_chunks), _split(weights_BT, n_chunks)
    zeros_DV = jnp.zeros(embedding_VD.shape[::-1], jnp.float32)
    d_embedding_DV, (losses_NBU, d_x_NBUD) = jax.lax.scan(chunk, zeros_DV, parts)
    token_losses_BT = _join(losses_NBU)
    out = (token_losses_BT * weights_BT).sum(), token_losses_BT
    return out, (_join(d_x_NBUD), d_embedding_DV.T.astype(embedding_VD.dtype))


def _weighted_sum_backward(
    n_chunks: int,
    vocab_size: int,
    residuals: tuple[Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, None, None]:
    d_total, _ = cotangents
    d_x_BTD, d_embedding_VD = ((d * d_total).astype(d.dtype) for d in residuals)
    return d_x_BTD, d_embedding_VD, None, None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def _losses(logits_BTV: Array, targets_BT: Array) -> tuple[Array, Array, Array]:
    """Return token losses `[B, T]`, and the softmax as exp `[B, T, V]` and its sum `[B, T]`."""
    max_BT = logits_BTV.max(-1)
    exp_BTV = jnp.exp(logits_BTV - max_BT[..., None])
    sum_BT = exp_BTV.sum(-1)
    # Not take_along_axis: under a manual data axis XLA's partitioner aborts on it.
    target_BT = jnp.where(_hits(logits_BTV, targets_BT), logits_BTV, 0).sum(-1)
    return jnp.log(sum_BT) + max_BT - target_BT, exp_BTV, sum_BT


def _hits(logits_BTV: Array, targets_BT: Array) -> Array:
    return jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]


def _split(x: Array, n_chunks: int) -> Array:
    """[B, T, ...] -> [N, B, U, ...]: each of N chunks has a part of every shard; U = T / N."""
    n_shards = sequence.context_size()
    parts = x.reshape(x.shape[0], n_shards, n_chunks, -1, *x.shape[2:])
    return jnp.moveaxis(parts, 2, 0).reshape(n_chunks, x.shape[0], -1, *x.shape[2:])


def _join(x: Array) -> Array:
    """[N, B, U, ...] -> [B, T, ...]: undo `_split`."""
    n_chunks, n_rows = x.shape[:2]
    parts = x.reshape(n_chunks, n_rows, sequence.context_size(), -1, *x.shape[3:])
    return jnp.moveaxis(parts, 0, 2).reshape(n_rows, -1, *x.shape[3:])
