"""Causal self-attention behind one call, `attend`, with its implementations.

`xla` runs everywhere and does everything: it walks static blocks of queries and leaves out the
keys that no query of a block can see. `cudnn` is NVIDIA's fused kernel for 16-bit types without
attention dropout. What a token sees: itself and earlier positions, of its own document where
segments are given, at most `window` positions back where a window is given.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt3jax import config, dropout, sharding, zigzag

QUERY_BLOCK = 256  # queries whose scores are held at once; 4 blocks at 1,024 were fastest on CPU
HIDDEN = -1e30  # a score that softmax turns to 0, also in fp32 sums


def choose(model: config.Model, compute_dtype: str, platform: str) -> str:
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
        raise config.UserError(
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
    remat_blocks: bool = False,
) -> Array:
    """Return attention's output `[B, T, H, K]` in the dtype of v, softmax in fp32.

    `dropout_rate` acts on the probabilities where `noise` is given (training). `remat_blocks` makes
    the backward pass compute the scores of each block again rather than keep them.
    """
    if implementation not in ("xla", "cudnn"):
        raise ValueError(f"attention implementation {implementation!r}: use xla or cudnn")
    sharded = sharding.context_size() > 1
    walk = functools.partial(
        _walk,
        noise=noise,
        window=window,
        dropout_rate=dropout_rate,
        remat_blocks=remat_blocks or sharded,  # long sequences: scores fill the memory
    )
    if sharded:
        # cuDNN's masks do not fit a band over chunks; it reads few keys, so XLA's is good enough.
        fused = implementation == "cudnn" and window is None
        shards: Any = _zigzag if fused else functools.partial(_walk_shards, walk, window)
        if remat_blocks:  # keep no gathered keys and values
            policy = jax.checkpoint_policies.save_only_these_names(zigzag.SAVED)
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
    q_BCTHK, q_segments_BCT = sharding.split_sequence((q_BTHK, segments_BT))
    keys = k_BSHK, v_BSHK, segments_BT
    if window is None:
        keys = jax.tree.map(lambda x: x[:, :, None], sharding.gather_sequence(keys))
    else:
        keys = sharding.gather_stretches(keys, window)
    k_BCRSHK, v_BCRSHK, k_segments_BCRS = keys
    out_BCTHK = jax.vmap(walk, in_axes=(0, 1, 1, 1, 1, 1), out_axes=1)(
        jnp.arange(q_BCTHK.shape[1]), q_BCTHK, k_BCRSHK, v_BCRSHK, q_segments_BCT, k_segments_BCRS
    )
    return out_BCTHK.reshape(q_BTHK.shape)


def _zigzag(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, segments_BT: Array | None) -> Array:
    """Run cuDNN's kernels on each shard of the sequence."""
    arrays = sharding.split_sequence((q_BTHK, k_BSHK, v_BSHK))
    arrays += sharding.gather_sequence((k_BSHK, v_BSHK))
    axes: list[tuple[str | None, ...]] = [("batch", "seq", None, "heads", None)] * len(arrays)
    if segments_BT is not None:
        arrays += sharding.split_sequence(segments_BT), sharding.gather_sequence(segments_BT)
        axes += [("batch", "seq", None)] * 2
    shards_C = jnp.arange(arrays[0].shape[1])
    local = sharding.map_shards(zigzag.attend, [("seq",), *axes], axes[0])
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
    remat_blocks: bool,
) -> Array:
    """Attend from the queries of one shard, a block of a chunk at a time.

    Each of its R chunks has keys of its own, or all have the same (one R). Where blocks start
    depends on the shard, but how many keys they read does not.
    """
    n_positions = q_BTHK.shape[1] * sharding.context_size()
    starts_CR = sharding.chunk_starts(n_positions)
    firsts_CR = sharding.stretch_starts(n_positions, n_positions if window is None else window)
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
            block: Any = functools.partial(
                _block,
                start=_of_shard(start_C, shard),
                first=_of_shard(first_C + seen.start, shard),
                n_drawn=int(first_C.max()) + seen.stop,
                window=window,
                dropout_rate=dropout_rate,
            )
            if remat_blocks:
                block = jax.checkpoint(block, prevent_cse=False)
            segments = None
            if q_segments_BT is not None and k_segments_BRS is not None:
                k_segments_BS = k_segments_BRS[:, chunk % k_segments_BRS.shape[1]]
                segments = q_segments_BT[:, begin:end], k_segments_BS[:, seen]
            out.append(block(q_BTHK[:, begin:end], *(x[:, seen] for x in keys), segments, noise))
    return jnp.concatenate(out, axis=1)


def _of_shard(number_C: np.ndarray, shard: int | Array) -> Any:
    """Return the shard's number: where all have the same, a Python int, for static slices."""
    if (number_C == number_C[0]).all():
        return int(number_C[0])
    return jnp.asarray(number_C)[shard]


def _part(x: Any, first: Any, size: int, axis: int) -> Array:
    if isinstance(first, int):
        return jax.lax.slice_in_dim(x, first, first + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis)


def _block(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    segments: tuple[Array, Array] | None,
    noise: dropout.Noise | None,
    *,
    start: int | Array,
    first: int | Array,
    n_drawn: int,
    window: int | None,
    dropout_rate: float,
) -> Array:
    """Attend from queries at positions `start...` to keys at positions `first...`.

    `n_drawn` is the number of keys, from position 0 on, that dropout is drawn for: what is drawn
    for a key must not depend on where the block starts.
    """
    scale = q_BTHK.shape[-1] ** -0.5
    t_T = start + jnp.arange(q_BTHK.shape[1])
    s_S = first + jnp.arange(k_BSHK.shape[1])
    scores_BHTS = jnp.einsum(
        "bthk,bshk->bhts", q_BTHK * scale, k_BSHK, preferred_element_type=jnp.float32
    )
    scores_BHTS = jnp.where(_visible(t_T, s_S, window, segments), scores_BHTS, HIDDEN)
    max_BHT1 = jax.lax.stop_gradient(scores_BHTS.max(-1, keepdims=True))
    exp_BHTS = jnp.exp(scores_BHTS - max_BHT1)
    # The softmax's division comes last: K values a row in place of S.
    sum_BTH1 = jnp.einsum("bhts->bth", exp_BHTS)[..., None]
    if noise is not None and dropout_rate:
        keep_BTHS = dropout.keep_mask(noise, dropout_rate, t_T, (q_BTHK.shape[2],), n_drawn)
        keep_BTHS = _part(keep_BTHS, first, k_BSHK.shape[1], 3)
        keep_BHTS = jnp.einsum("bths->bhts", keep_BTHS)
        # A choice, for its derivative saves the mask's bytes: a product's would save fp32 numbers.
        exp_BHTS = jnp.where(keep_BHTS, exp_BHTS / (1 - dropout_rate), 0)
    out_BTHK = jnp.einsum(
        "bhts,bshk->bthk", exp_BHTS.astype(v_BSHK.dtype), v_BSHK,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return (out_BTHK / sum_BTH1).astype(v_BSHK.dtype)


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
    return sharding.map_shards(local, axes, axes[0])(*arrays)
