"""Plain attention with the arguments of cuDNN's kernels (`model.cudnn_attention`), for CPUs."""

import jax
import jax.numpy as jnp


def scores_of(part, causal):
    """Return masked scores `[..., H, T, S]` of one call of cuDNN's kernel."""
    q, k, _, q_segments, k_segments = part
    scores = jnp.einsum("...thk,...shk->...hts", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = jnp.where(jnp.tri(q.shape[-3], k.shape[-3]), scores, -1e12)
    if q_segments is not None:
        agree = q_segments[..., :, None] == k_segments[..., None, :]
        scores = jnp.where(agree[..., None, :, :], scores, -1e12)
    return scores


def forward(part, *, causal):
    scores = scores_of(part, causal)
    out = jnp.einsum("...hts,...shk->...thk", jax.nn.softmax(scores), part[2])
    return out, jax.nn.logsumexp(scores, axis=-1)


def backward(part, sums, out, d_out, *, causal):
    """The backward pass of flash attention: probabilities from the sums it is given."""
    q, k, v = part[:3]
    p = jnp.exp(scores_of(part, causal) - sums[..., None])
    d_p = jnp.einsum("...thk,...shk->...hts", d_out, v)
    mean = jnp.einsum("...thk,...thk->...ht", d_out, out)
    d_scores = p * (d_p - mean[..., None]) / q.shape[-1] ** 0.5
    return [
        jnp.einsum("...hts,...shk->...thk", d_scores, k),
        jnp.einsum("...hts,...thk->...shk", d_scores, q),
        jnp.einsum("...hts,...thk->...shk", p, d_out),
    ]
