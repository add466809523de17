"""Causal self-attention behind one call, `attend`, with its implementations.

`xla` runs everywhere and does everything: it walks static blocks of queries and leaves out the
keys that no query of a block can see. `cudnn` is NVIDIA's fused kernel for 16-bit types without
attention dropout. What a token sees: itself and earlier positions, of its own document where
segments are given, at most `window` positions back where a window is given.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.model import cudnn_attention, dropout
from gpt3jax.sharding import rules, sequence

QUERY_BLOCK = 256  # queries whose scores are held at once; 4 blocks at 1,024 were fastest on CPU
HIDDEN = -1e30  # a score that softmax turns to 0, also in fp32 sums


def choose(model: schema.Model, compute_dtype: str, platform: str) -> str:
    """Return "cudnn" or "xla" for what the config asks and the devices' platform can do.

    Raises:
        UserError: cuDNN was asked for where there is no GPU or it does not serve.
    """
    asked = model.attention.implementation
    serves = (
        compute_dtype != "float32"
        and not model.attention_dropout
        and model.d_head % 8 == 0
        and model.d_head <= 128
    )
    if asked == "cudnn" and not (serves and platform == "gpu"):
        raise errors.UserError(
            f"model.attention.implementation=cudnn does not serve here (devices: {platform}; "
            f"model.d_head={model.d_head} must be a multiple of 8 up to 128): use auto or xla"
        )
    if asked == "auto":
        return "cudnn" if serves and platform == "gpu" else "xla"
    return asked


def attend(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    *,
    implementation: str,
    window: int | None = None,
    segments_BT: Array | None = None,
    dropout_rate: float = 0.0,
    noise: dropout.Noise | None = None,
    gather_again: bool = False,
) -> Array:
    """Return attention's output `[B, T, H, K]` in the dtype of v, softmax in fp32.

    `dropout_rate` acts on the probabilities where `noise` is given (training). No scores are kept
    for the backward pass. With `gather_again` it also gathers keys and values over `context` again.
    """
    if implementation not in ("xla", "cudnn"):
        raise ValueError(f"attention implementation {implementation!r}: use xla or cudnn")
    if noise is None or not dropout_rate:
        noise, dropout_rate = None, 0.0
    walk = functools.partial(_walk, noise=noise, window=window, dropout_rate=dropout_rate)
    if sequence.context_size() > 1:
        # cuDNN's masks do not fit a band over chunks; it reads few keys, so XLA's is good enough.
        fused = implementation == "cudnn" and window is None
        shards: Any = _zigzag if fused else functools.partial(_walk_shards, walk, window)
        if gather_again:
            policy = jax.checkpoint_policies.save_only_these_names(cudnn_attention.SAVED)
            shards = jax.checkpoint(shards, policy=policy, prevent_cse=False)
        return shards(q_BTHK, k_BSHK, v_BSHK, segments_BT)
    if implementation == "cudnn":
        return _cudnn(q_BTHK, k_BSHK, v_BSHK, window, segments_BT)
    k_B1SHK, v_B1SHK, segments_B1S = jax.tree.map(
        lambda x: x[:, None], (k_BSHK, v_BSHK, segments_BT)
    )
    return walk(0, q_BTHK, k_B1SHK, v_B1SHK, segments_BT, segments_B1S)


def n_scores(n_positions: int, window: int | None) -> int:
    """Return how many scores of a head and row `xla` works out: of a block all keys it may see."""
    starts = range(0, n_positions, QUERY_BLOCK)
    ends = [min(start + QUERY_BLOCK, n_positions) for start in starts]
    firsts = [0 if window is None else max(0, start - window) for start in starts]
    blocks = zip(firsts, starts, ends, strict=True)
    return sum((end - start) * (end - first) for first, start, end in blocks)


def _walk_shards(
    walk: Any,
    window: int | None,
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    segments_BT: Array | None,
) -> Array:
    """Let each shard of the sequence walk its queries, with the keys and values that it needs."""
    q_BCTHK, q_segments_BCT = sequence.split_sequence((q_BTHK, segments_BT))
    keys = k_BSHK, v_BSHK, segments_BT
    if window is None:
        keys = jax.tree.map(lambda x: x[:, :, None], sequence.gather_sequence(keys))
    else:
        keys = sequence.gather_stretches(keys, window)
    k_BCRSHK, v_BCRSHK, k_segments_BCRS = keys
    out_BCTHK = jax.vmap(walk, in_axes=(0, 1, 1, 1, 1, 1), out_axes=1)(
        jnp.arange(q_BCTHK.shape[1]), q_BCTHK, k_BCRSHK, v_BCRSHK, q_segments_BCT, k_segments_BCRS
    )
    return out_BCTHK.reshape(q_BTHK.shape)


def _zigzag(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, segments_BT: Array | None) -> Array:
    """Run cuDNN's kernels on each shard of the sequence."""
    arrays = sequence.split_sequence((q_BTHK, k_BSHK, v_BSHK))
    arrays += sequence.gather_sequence((k_BSHK, v_BSHK))
    axes: list[tuple[str | None, ...]] = [("batch", "seq", None, "heads", None)] * len(arrays)
    if segments_BT is not None:
        arrays += sequence.split_sequence(segments_BT), sequence.gather_sequence(segments_BT)
        axes += [("batch", "seq", None)] * 2
    shards_C = jnp.arange(arrays[0].shape[1])
    local = rules.map_shards(cudnn_attention.attend, [("seq",), *axes], axes[0])
    return local(shards_C, *arrays).reshape(q_BTHK.shape)


def _walk(
    shard: int | Array,
    q_BTHK: Array,
    k_BRSHK: Array,
    v_BRSHK: Array,
    q_segments_BT: Array | None,
    k_segments_BRS: Array | None,
    *,
    noise: dropout.Noise | None,
    window: int | None,
    dropout_rate: float,
) -> Array:
    """Attend from the queries of one shard, a block of a chunk at a time.

    Each of its R chunks has keys of its own, or all have the same (one R). Where blocks start
    depends on the shard, but how many keys they read does not.
    """
    n_positions = q_BTHK.shape[1] * sequence.context_size()
    starts_CR = sequence.chunk_starts(n_positions)
    firsts_CR = sequence.stretch_starts(n_positions, n_positions if window is None else window)
    length = n_positions // starts_CR.size
    out = []
    for i in range(0, q_BTHK.shape[1], length):
        chunk = i // length
        keys = [x[:, chunk % x.shape[1]] for x in (k_BRSHK, v_BRSHK)]
        for begin in range(i, i + length, QUERY_BLOCK):
            end = min(begin + QUERY_BLOCK, i + length)
            start_C = starts_CR[:, chunk] + (begin - i)
            first_C = firsts_CR[:, chunk]
            seen = slice(
                0 if window is None else int((np.maximum(0, start_C - window) - first_C).min()),
                int((start_C + (end - begin) - first_C).max()),
            )
            places = (tuple(x.tolist()) for x in (start_C, first_C + seen.start))
            how = _How(window, dropout_rate, *places)
            segments = None
            if q_segments_BT is not None and k_segments_BRS is not None:
                k_segments_BS = k_segments_BRS[:, chunk % k_segments_BRS.shape[1]]
                segments = q_segments_BT[:, begin:end], k_segments_BS[:, seen]
            arrays = q_BTHK[:, begin:end], *(x[:, seen] for x in keys)
            out.append(_block(how, *arrays, segments, noise, jnp.asarray(shard)))
    return jnp.concatenate(out, axis=1)


@dataclasses.dataclass(frozen=True)
class _How:
    """What is known of a block when it is compiled."""

    window: int | None
    dropout_rate: float
    starts: tuple[int, ...]  # the first query's position, on each shard of the sequence
    firsts: tuple[int, ...]  # the first key's


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(
    how: _How, q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, segments: tuple[Array, Array] | None,
    noise: dropout.Noise | None, shard: Array,
) -> Array:  # fmt: skip
    """Attend from consecutive queries to consecutive keys, which start where the shard's do."""
    return _forward(how, q_BTHK, k_BSHK, v_BSHK, segments, noise, shard)[0]


def _forward(
    how: _How, q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, *places: Any
) -> tuple[Array, Any]:
    """Return the output, and what `_backward` takes: of the scores the logs of the sums alone."""
    scores_BHTS, keep_BHTS = _scores_and_mask(how, q_BTHK, k_BSHK, *places)
    max_BHT1 = scores_BHTS.max(-1, keepdims=True)
    exp_BHTS = jnp.exp(scores_BHTS - max_BHT1)
    sum_BHT = jnp.einsum("bhts->bht", exp_BHTS)
    out_BTHK = jnp.einsum(
        "bhts,bshk->bthk", _dropped(how, exp_BHTS, keep_BHTS).astype(v_BSHK.dtype), v_BSHK,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    # The softmax's division comes last: K values a row in place of S.
    out_BTHK = (out_BTHK / jnp.einsum("bht->bth", sum_BHT)[..., None]).astype(v_BSHK.dtype)
    out_BTHK = checkpoint_name(out_BTHK, cudnn_attention.SAVED)
    log_sum_BHT1 = checkpoint_name(max_BHT1 + jnp.log(sum_BHT)[..., None], cudnn_attention.SAVED)
    return out_BTHK, (q_BTHK, k_BSHK, v_BSHK, places, out_BTHK, log_sum_BHT1)


def _backward(how: _How, residuals: Any, d_out_BTHK: Array) -> tuple[Any, ...]:
    """Return the gradients of queries, keys and values, as FlashAttention has them.

    Source: Dao et al. 2022, appendix B. Products take 16-bit operands where the values are 16-bit.
    """
    q_BTHK, k_BSHK, v_BSHK, places, out_BTHK, log_sum_BHT1 = residuals
    scores_BHTS, keep_BHTS = _scores_and_mask(how, q_BTHK, k_BSHK, *places)
    probs_BHTS = jnp.exp(scores_BHTS - log_sum_BHT1)
    kept_BHTS = _dropped(how, probs_BHTS, keep_BHTS).astype(v_BSHK.dtype)
    d_v_BSHK = jnp.einsum("bhts,bthk->bshk", kept_BHTS, d_out_BTHK)
    d_probs_BHTS = jnp.einsum(
        "bthk,bshk->bhts", d_out_BTHK, v_BSHK, preferred_element_type=jnp.float32
    )
    d_probs_BHTS = _dropped(how, d_probs_BHTS, keep_BHTS)
    mean_BHT = jnp.einsum(
        "bthk,bthk->bht", out_BTHK, d_out_BTHK, preferred_element_type=jnp.float32
    )
    d_scores_BHTS = (probs_BHTS * (d_probs_BHTS - mean_BHT[..., None])).astype(q_BTHK.dtype)
    scale = q_BTHK.shape[-1] ** -0.5
    d_q_BTHK = jnp.einsum("bhts,bshk->bthk", d_scores_BHTS, k_BSHK * scale)
    d_k_BSHK = jnp.einsum("bhts,bthk->bshk", d_scores_BHTS, q_BTHK * scale)
    return d_q_BTHK, d_k_BSHK, d_v_BSHK, *(None for _ in places)


_block.defvjp(_forward, _backward)


def _scores_and_mask(
    how: _How,
    q_BTHK: Array,
    k_BSHK: Array,
    segments: tuple[Array, Array] | None,
    noise: dropout.Noise | None,
    shard: Array,
) -> tuple[Array, Array | None]:
    """Return the scores, and which of them dropout keeps (None: all)."""
    scale, n_keys = q_BTHK.shape[-1] ** -0.5, k_BSHK.shape[1]
    t_T = _of_shard(how.starts, shard) + jnp.arange(q_BTHK.shape[1])
    s_S = _of_shard(how.firsts, shard) + jnp.arange(n_keys)
    scores_BHTS = jnp.einsum(
        "bthk,bshk->bhts", q_BTHK * scale, k_BSHK, preferred_element_type=jnp.float32
    )
    scores_BHTS = jnp.where(_visible(t_T, s_S, how.window, segments), scores_BHTS, HIDDEN)
    if noise is None:
        return scores_BHTS, None
    # From position 0 on: what is drawn for a key must not depend on where the block starts.
    n_drawn, rows = max(how.firsts) + n_keys, (q_BTHK.shape[2],)
    keep_BTHS = dropout.keep_mask(noise, how.dropout_rate, t_T, rows, n_drawn)
    parts = [keep_BTHS[..., first : first + n_keys] for first in how.firsts]
    return scores_BHTS, jnp.einsum("bths->bhts", _of_shard(parts, shard))


def _of_shard(values: Sequence[Any], shard: Array) -> Any:
    """Return a shard's own of the values of all, by selection.

    Indexing with a shard's number, for all shards at once, would be a gather for the partitioner.
    """
    chosen = values[0]
    for i, value in enumerate(values[1:], start=1):
        chosen = jnp.where(shard == i, value, chosen)
    return chosen


def _dropped(how: _How, x_BHTS: Array, keep_BHTS: Array | None) -> Array:
    return x_BHTS if keep_BHTS is None else jnp.where(keep_BHTS, x_BHTS / (1 - how.dropout_rate), 0)


def _visible(
    t_T: Array, s_S: Array, window: int | None, segments: tuple[Array, Array] | None
) -> Array:
    """Return the bool mask `[T, S]`, or `[B, 1, T, S]` with segments: True where t may see s."""
    visible = t_T[:, None] >= s_S
    if window is not None:
        visible &= t_T[:, None] - s_S <= window
    if segments is not None:
        visible = visible & (segments[0][:, None, :, None] == segments[1][:, None, None, :])
    return visible


def _cudnn(
    q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, window: int | None, segments_BT: Array | None
) -> Array:
    kernel = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        implementation="cudnn",
        local_window_size=None if window is None else (window, 0),
    )

    def local(q: Array, k: Array, v: Array, *segments: Array) -> Array:
        mask = [s[:, None, :, None] == s[:, None, None, :] for s in segments]
        return kernel(q, k, v, mask=mask[0] if mask else None)

    arrays: list[Any] = [q_BTHK, k_BSHK, v_BSHK]
    axes: list[tuple[str | None, ...]] = [("batch", None, "heads", None)] * 3
    if segments_BT is not None:
        arrays, axes = [*arrays, segments_BT], [*axes, ("batch", None)]
    return rules.map_shards(local, axes, axes[0])(*arrays)
