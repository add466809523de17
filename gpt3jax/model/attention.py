"""Causal self-attention behind one call, `attend`, with its implementations.

`xla` runs everywhere and does everything: it goes through blocks of queries (`plan_blocks`) and
leaves out the keys that no query of a block can see. `cudnn` is NVIDIA's fused kernel for 16-bit
types without attention dropout; `triton` is ours, with it. A token sees itself and earlier
positions: of its own document where segments are given, at most `window` positions back where a
window is given.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.model import cudnn_attention, dropout, triton_attention
from gpt3jax.sharding import sequence

QUERY_BLOCK = 256  # queries whose scores are held at once; 4 blocks at 1,024 were fastest on CPU
HIDDEN = -1e30  # a score that softmax turns to 0, also in fp32 sums

Segments: TypeAlias = tuple[Array, Array] | None
"""The document numbers of queries and of keys, where documents are hidden from each other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a layer attends: what is known when the program is compiled."""

    implementation: str  # "xla", "cudnn" or "triton"
    window: int | None = None  # how many earlier positions a query sees; None: all
    dropout_rate: float = 0.0  # of the probabilities, where `noise` is given (training)
    gather_again: bool = False  # the backward pass gathers keys and values over `context` again


def choose(model: schema.Model, compute_dtype: str, platform: str, n_shards: int) -> str:
    """Return "cudnn", "triton" or "xla": what the config asks for, or the fastest that serves.

    The sequence is split into `n_shards` over `context`; `platform` is that of the devices.

    Raises:
        UserError: what was asked for does not serve here.
    """
    requested = model.attention.implementation
    refusals = {"cudnn": _cudnn_refusal(model, compute_dtype), "xla": ""}
    refusals["triton"] = (
        _triton_refusal(model, compute_dtype, n_shards) or triton_attention.missing()
    )
    if platform != "gpu":
        refusals |= dict.fromkeys(("cudnn", "triton"), f"the devices are no GPUs, but {platform}")
    if requested == "auto":
        return next(name for name in ("cudnn", "triton", "xla") if not refusals[name])
    if refusals[requested]:
        raise errors.UserError(
            f"model.attention.implementation={requested} does not serve here: "
            f"{refusals[requested]}; or use auto",
            page="reference/options.md#model",
        )
    return requested


def missing_extra(model: schema.Model, compute_dtype: str, platform: str, n_shards: int) -> str:
    """Return a line on the extra that would make attention faster here, "" if none would."""
    missing = triton_attention.missing()
    if model.attention.implementation != "auto" or platform != "gpu" or not missing:
        return ""
    if not _cudnn_refusal(model, compute_dtype) or _triton_refusal(model, compute_dtype, n_shards):
        return ""
    return (
        "attention with dropout goes by XLA, which writes every score to memory. By the plan, a "
        "step of 857M parameters takes half the time with the fused kernel, which has the same "
        f"masks; {missing}"
    )


def _cudnn_refusal(model: schema.Model, compute_dtype: str) -> str:
    if model.attention_dropout:
        rate = model.attention_dropout
        return f"its masks would depend on the mesh (model.attention_dropout={rate})"
    if compute_dtype == "float32":
        return "it computes in float16 or bfloat16, not in float32"
    if model.d_head % 8 or model.d_head > 128:
        return f"model.d_head={model.d_head} must be a multiple of 8 up to 128"
    return ""


def _triton_refusal(model: schema.Model, compute_dtype: str, n_shards: int) -> str:
    n_chunks = 1 if n_shards == 1 else 2 * n_shards
    return triton_attention.refusal(model.seq_len // n_chunks, model.d_head, compute_dtype)


def attend(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    *,
    options: Options,
    segments_BT: Array | None = None,
    noise: dropout.Noise | None = None,
) -> Array:
    """Return attention's output `[B, T, H, K]` in the dtype of v, with the softmax in fp32.

    The backward pass keeps no scores.
    """
    if options.implementation not in ("xla", "cudnn", "triton"):
        raise ValueError(f"there is no attention implementation {options.implementation!r}")
    if not options.dropout_rate:
        noise = None
    if sequence.context_size() > 1:
        return _attend_in_shards(q_BTHK, k_BSHK, v_BSHK, options, segments_BT, noise)
    if options.implementation == "cudnn":
        return cudnn_attention.attend(q_BTHK, k_BSHK, v_BSHK, options.window, segments_BT)
    if options.implementation == "triton":
        return _triton(options, noise, q_BTHK, k_BSHK, v_BSHK, segments_BT)
    k_B1SHK, v_B1SHK, segments_B1S = jax.tree.map(
        lambda x: x[:, None], (k_BSHK, v_BSHK, segments_BT)
    )
    segments = None if segments_BT is None else (segments_BT, segments_B1S)
    return _attend_shard(options, noise, 0, q_BTHK, k_B1SHK, v_B1SHK, segments)


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive queries of one chunk of the sequence, and the consecutive keys that they read.

    Where a block lies in the sequence depends on the shard; how much it reads does not.
    """

    chunk: int  # which of the shard's chunks
    queries: slice  # among the shard's queries
    keys: slice  # among the keys that the chunk has at hand
    query_starts: tuple[int, ...]  # the position of the first query, on each shard
    key_starts: tuple[int, ...]  # the position of the first key, on each shard


def plan_blocks(
    query_starts_CR: np.ndarray, key_starts_CR: np.ndarray, length: int, window: int | None
) -> Iterator[Block]:
    """Yield the blocks that every shard goes through, in the order of its queries.

    Each of C shards holds R chunks of `length` consecutive positions, which start at
    `query_starts_CR`; the keys that a chunk has at hand start at `key_starts_CR`.
    """
    for chunk in range(query_starts_CR.shape[1]):
        key_starts_C = key_starts_CR[:, chunk]
        for begin in range(0, length, QUERY_BLOCK):
            end = min(begin + QUERY_BLOCK, length)
            start_C = query_starts_CR[:, chunk] + begin
            first_C = np.zeros_like(start_C) if window is None else np.maximum(0, start_C - window)
            # The widest of what the shards need: from the earliest first key to the latest end.
            first = int((first_C - key_starts_C).min())
            stop = int((start_C + (end - begin) - key_starts_C).max())
            yield Block(
                chunk,
                slice(chunk * length + begin, chunk * length + end),
                slice(first, stop),
                tuple(start_C.tolist()),
                tuple((key_starts_C + first).tolist()),
            )


def n_scores(n_positions: int, window: int | None) -> int:
    """Return how many scores `xla` computes for one head and row where one shard holds it all."""
    start_11 = np.zeros((1, 1), np.int32)
    blocks = plan_blocks(start_11, start_11, n_positions, window)
    return sum(_length(block.queries) * _length(block.keys) for block in blocks)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _attend_in_shards(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    options: Options,
    segments_BT: Array | None,
    noise: dropout.Noise | None,
) -> Array:
    """Attend where the sequence is split over `context`."""
    shards: Callable[..., Array] = functools.partial(_xla_in_shards, options, noise)
    if options.implementation == "triton":
        shards = functools.partial(_triton, options, noise)
    # cuDNN's masks do not fit a band over chunks; it reads few keys, so XLA's is good enough.
    elif options.implementation == "cudnn" and options.window is None:
        shards = cudnn_attention.attend_in_shards
    if options.gather_again:
        policy = jax.checkpoint_policies.save_only_these_names(cudnn_attention.SAVED)
        shards = jax.checkpoint(shards, policy=policy, prevent_cse=False)
    return shards(q_BTHK, k_BSHK, v_BSHK, segments_BT)


def _triton(
    options: Options,
    noise: dropout.Noise | None,
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    segments_BT: Array | None,
) -> Array:
    """Attend by our own kernels, whether the sequence is split or not."""
    words_BTH2 = None
    if noise is not None:
        # Outside of the kernels' shards, where heads and positions have the numbers of the whole.
        order_T = sequence.sequence_order(q_BTHK.shape[1])
        words_BTH2 = dropout.row_words(noise, order_T, q_BTHK.shape[2])
    return triton_attention.attend(
        q_BTHK, k_BSHK, v_BSHK, window=options.window, segments_BT=segments_BT,
        words_BTH2=words_BTH2, rate=options.dropout_rate,
    )  # fmt: skip


def _xla_in_shards(
    options: Options,
    noise: dropout.Noise | None,
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    segments_BT: Array | None,
) -> Array:
    """Let each shard of the sequence attend from its queries to the keys that it needs."""
    q_BCTHK, q_segments_BCT = sequence.split_sequence((q_BTHK, segments_BT))
    keys = k_BSHK, v_BSHK, segments_BT
    if options.window is None:
        keys = jax.tree.map(lambda x: x[:, :, None], sequence.gather_sequence(keys))
    else:
        keys = sequence.gather_stretches(keys, options.window)
    k_BCRSHK, v_BCRSHK, k_segments_BCRS = keys
    segments: Segments = None
    if q_segments_BCT is not None and k_segments_BCRS is not None:
        segments = q_segments_BCT, k_segments_BCRS
    attend_shard = functools.partial(_attend_shard, options, noise)
    out_BCTHK = jax.vmap(attend_shard, in_axes=(0, 1, 1, 1, 1), out_axes=1)(
        jnp.arange(q_BCTHK.shape[1]), q_BCTHK, k_BCRSHK, v_BCRSHK, segments
    )
    return out_BCTHK.reshape(q_BTHK.shape)


def _attend_shard(
    options: Options,
    noise: dropout.Noise | None,
    shard: int | Array,
    q_BTHK: Array,
    k_BRSHK: Array,
    v_BRSHK: Array,
    segments: Segments,
) -> Array:
    """Attend from the queries of one shard, block by block.

    Each of its R chunks has keys of its own, or all have the same (R is 1 then).
    """
    n_positions, window = q_BTHK.shape[1] * sequence.context_size(), options.window
    query_starts_CR = sequence.chunk_starts(n_positions)
    key_starts_CR = sequence.stretch_starts(n_positions, n_positions if window is None else window)
    length = n_positions // query_starts_CR.size
    plan, out = plan_blocks(query_starts_CR, key_starts_CR, length, window), []
    for chunk, blocks in itertools.groupby(plan, lambda block: block.chunk):
        k_BSHK, v_BSHK = (x[:, chunk % x.shape[1]] for x in (k_BRSHK, v_BRSHK))
        for block in blocks:
            mask = _Mask(window, options.dropout_rate, block.query_starts, block.key_starts)
            block_segments = None
            if segments is not None:
                k_segments_BS = segments[1][:, chunk % segments[1].shape[1]]
                block_segments = segments[0][:, block.queries], k_segments_BS[:, block.keys]
            arrays = q_BTHK[:, block.queries], k_BSHK[:, block.keys], v_BSHK[:, block.keys]
            out.append(_attend_block(mask, *arrays, block_segments, noise, jnp.asarray(shard)))
    return jnp.concatenate(out, axis=1)


@dataclasses.dataclass(frozen=True)
class _Mask:
    """What decides which of a block's scores count, as far as it is known when it is compiled."""

    window: int | None
    dropout_rate: float
    query_starts: tuple[int, ...]  # the position of the first query, on each shard
    key_starts: tuple[int, ...]  # the position of the first key, on each shard


# The rest of what decides which scores count: segments, dropout's noise, the shard's number.
_MaskArrays: TypeAlias = tuple[Segments, dropout.Noise | None, Array]
# Queries, keys, values, the mask's arrays, the output, the logs of the softmax's sums.
_Residuals: TypeAlias = tuple[Array, Array, Array, _MaskArrays, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_block(
    mask: _Mask, q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, segments: Segments,
    noise: dropout.Noise | None, shard: Array,
) -> Array:  # fmt: skip
    """Attend from a block's queries to its keys."""
    return _forward(mask, q_BTHK, k_BSHK, v_BSHK, segments, noise, shard)[0]


def _forward(
    mask: _Mask, q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, segments: Segments,
    noise: dropout.Noise | None, shard: Array,
) -> tuple[Array, _Residuals]:  # fmt: skip
    """Return the output, and what `_backward` needs: no scores, only the logs of their sums."""
    mask_arrays = segments, noise, shard
    scores_BHTS, keep_BHTS = _scores_and_kept(mask, q_BTHK, k_BSHK, mask_arrays)
    max_BHT1 = scores_BHTS.max(-1, keepdims=True)
    exp_BHTS = jnp.exp(scores_BHTS - max_BHT1)
    sum_BHT = jnp.einsum("bhts->bht", exp_BHTS)
    out_BTHK = jnp.einsum(
        "bhts,bshk->bthk", _dropped(mask, exp_BHTS, keep_BHTS).astype(v_BSHK.dtype), v_BSHK,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    # The softmax's division comes last: K values a row in place of S.
    out_BTHK = (out_BTHK / jnp.einsum("bht->bth", sum_BHT)[..., None]).astype(v_BSHK.dtype)
    out_BTHK = checkpoint_name(out_BTHK, cudnn_attention.SAVED)
    log_sum_BHT1 = checkpoint_name(max_BHT1 + jnp.log(sum_BHT)[..., None], cudnn_attention.SAVED)
    return out_BTHK, (q_BTHK, k_BSHK, v_BSHK, mask_arrays, out_BTHK, log_sum_BHT1)


def _backward(
    mask: _Mask, residuals: _Residuals, d_out_BTHK: Array
) -> tuple[Array, Array, Array, None, None, None]:
    """Return the gradients of queries, keys and values, as FlashAttention computes them.

    Source: Dao et al. 2022, appendix B. Products take 16-bit operands where the values are 16-bit.
    """
    q_BTHK, k_BSHK, v_BSHK, mask_arrays, out_BTHK, log_sum_BHT1 = residuals
    scores_BHTS, keep_BHTS = _scores_and_kept(mask, q_BTHK, k_BSHK, mask_arrays)
    probs_BHTS = jnp.exp(scores_BHTS - log_sum_BHT1)
    kept_BHTS = _dropped(mask, probs_BHTS, keep_BHTS).astype(v_BSHK.dtype)
    d_v_BSHK = jnp.einsum("bhts,bthk->bshk", kept_BHTS, d_out_BTHK)
    d_probs_BHTS = jnp.einsum(
        "bthk,bshk->bhts", d_out_BTHK, v_BSHK, preferred_element_type=jnp.float32
    )
    d_probs_BHTS = _dropped(mask, d_probs_BHTS, keep_BHTS)
    mean_BHT = jnp.einsum(
        "bthk,bthk->bht", out_BTHK, d_out_BTHK, preferred_element_type=jnp.float32
    )
    d_scores_BHTS = (probs_BHTS * (d_probs_BHTS - mean_BHT[..., None])).astype(q_BTHK.dtype)
    scale = q_BTHK.shape[-1] ** -0.5
    d_q_BTHK = jnp.einsum("bhts,bshk->bthk", d_scores_BHTS, k_BSHK * scale)
    d_k_BSHK = jnp.einsum("bhts,bthk->bshk", d_scores_BHTS, q_BTHK * scale)
    return d_q_BTHK, d_k_BSHK, d_v_BSHK, None, None, None


_attend_block.defvjp(_forward, _backward)


def _scores_and_kept(
    mask: _Mask, q_BTHK: Array, k_BSHK: Array, mask_arrays: _MaskArrays
) -> tuple[Array, Array | None]:
    """Return the scores, and which of them dropout keeps (None: all)."""
    segments, noise, shard = mask_arrays
    scale, n_keys = q_BTHK.shape[-1] ** -0.5, k_BSHK.shape[1]
    t_T = _select(mask.query_starts, shard) + jnp.arange(q_BTHK.shape[1])
    s_S = _select(mask.key_starts, shard) + jnp.arange(n_keys)
    scores_BHTS = jnp.einsum(
        "bthk,bshk->bhts", q_BTHK * scale, k_BSHK, preferred_element_type=jnp.float32
    )
    scores_BHTS = jnp.where(_visible(t_T, s_S, mask.window, segments), scores_BHTS, HIDDEN)
    if noise is None:
        return scores_BHTS, None
    words_BTH2 = dropout.row_words(noise, t_T, q_BTHK.shape[2])
    keep_BTHS = dropout.kept(words_BTH2, s_S, mask.dropout_rate)
    return scores_BHTS, jnp.einsum("bths->bhts", keep_BTHS)


def _select(values: Sequence[int], shard: Array) -> int | Array:
    """Return the value of this shard, from those of all shards.

    Indexing with a shard's number, for all shards at once, would be a gather for the partitioner.
    """
    selected: int | Array = values[0]
    for i, value in enumerate(values[1:], start=1):
        selected = jnp.where(shard == i, value, selected)
    return selected


def _dropped(mask: _Mask, x_BHTS: Array, keep_BHTS: Array | None) -> Array:
    if keep_BHTS is None:
        return x_BHTS
    return jnp.where(keep_BHTS, x_BHTS / dropout.kept_share(mask.dropout_rate), 0)


def _visible(t_T: Array, s_S: Array, window: int | None, segments: Segments) -> Array:
    """Return the bool mask `[T, S]`, or `[B, 1, T, S]` with segments: True where t may see s."""
    visible = t_T[:, None] >= s_S
    if window is not None:
        visible &= t_T[:, None] - s_S <= window
    if segments is not None:
        visible = visible & (segments[0][:, None, :, None] == segments[1][:, None, None, :])
    return visible
