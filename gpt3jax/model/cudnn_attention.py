"""cuDNN's attention: one kernel, or three for each shard of a sequence split over `context`.

A shard holds an early and a late chunk. cuDNN's causal mask starts at the first query and the first
key, so it serves where a chunk meets itself, and no mask is needed where it meets an earlier one.
Of 2 C chunks, n positions each, shard c meets: its own two, causally; with its late chunk all C
early ones; and one more chunk of each other shard, an early one with its early chunk (shards before
c) or a late one with its late chunk (shards after c). That is the same n^2 x 2 C on every shard,
the least a causal mask allows, and three kernels of static shapes. Their outputs are joined by
their softmax sums. Shape suffixes of this file: J the other shards, P the parts that are joined.

A private module of JAX is used here, `cudnn` (docs/architecture.md lists them all): tried on jax
0.10.2, 0.11.2 and 0.12.0.1. Public functions would replace it that give the sums in fp32, as
`jax.nn.dot_product_attention` does not (it rounds them to the format of q), and that run the
backward kernel with the joined output and sums, which none does.
"""

import functools
import inspect
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.ad_checkpoint import checkpoint_name

from gpt3jax.sharding import rules, sequence

# From 0.12 on the backward kernel's primitive needs one parameter more, which the function has too.
_NEWER: dict[str, None] = (
    {"score_mod": None}
    if "score_mod" in inspect.signature(cudnn.dot_product_attention).parameters
    else {}
)
SAVED = "zigzag"  # the name of what a backward pass needs to not run the kernels again

# Queries, keys, values, and the segments of queries and keys, of one kernel's call.
Part: TypeAlias = tuple[Array, Array, Array, Array | None, Array | None]
# Something of the three kernels each: own chunks, early chunks, chunks of other shards.
_Three: TypeAlias = tuple[Array, Array, Array]
_Segments: TypeAlias = tuple[Array | None, Array | None, Array | None]
# before_J, queries, keys, values, segments, outputs, the logs of the softmax's sums.
_Residuals: TypeAlias = tuple[Array, Array, _Three, _Three, _Segments, Array, Array]


def attend(
    q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, window: int | None, segments_BT: Array | None
) -> Array:
    """Return attention's output `[B, T, H, K]` where the sequence is whole on each device."""
    kernel = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        implementation="cudnn",
        local_window_size=None if window is None else (window, 0),
    )

    def local(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
        mask = None if segments is None else _agree(segments, segments)
        return kernel(q, k, v, mask=mask)

    arrays: list[Array] = [q_BTHK, k_BSHK, v_BSHK]
    axes: list[tuple[str | None, ...]] = [("batch", None, "heads", None)] * 3
    if segments_BT is not None:
        arrays, axes = [*arrays, segments_BT], [*axes, ("batch", None)]
    return rules.map_shards(local, axes, axes[0])(*arrays)


def attend_in_shards(
    q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, segments_BT: Array | None
) -> Array:
    """Return attention's output `[B, T, H, K]` where the sequence is split over `context`."""
    own = sequence.split_sequence((q_BTHK, k_BSHK, v_BSHK))
    whole = sequence.gather_sequence((k_BSHK, v_BSHK))
    arrays: list[tuple[Array, ...]] = [own, whole]
    axes: list[tuple[str | None, ...]] = [("batch", "seq", None, "heads", None)] * 2
    if segments_BT is not None:
        both = sequence.split_sequence(segments_BT), sequence.gather_sequence(segments_BT)
        arrays, axes = [*arrays, both], [*axes, ("batch", "seq", None)]
    shards_C = jnp.arange(own[0].shape[1])
    local = rules.map_shards(_attend_shard, [("seq",), *axes], axes[0])
    return local(shards_C, *arrays).reshape(q_BTHK.shape)


def _attend_shard(
    shard_1: Array,
    own_qkv: tuple[Array, Array, Array],
    whole_kv: tuple[Array, Array],
    segments: tuple[Array, Array] | None = None,
) -> Array:
    """Return the attention of one shard's queries to all keys up to each, `[B, 1, T, H, K]`.

    The first arrays are `[B, 1, T, H, K]`, the shard's early chunk and its late one; the second
    `[B, 1, S, H, K]`, the whole sequence in order; segments are those of both.
    """
    q_B1THK, k_B1THK, v_B1THK = own_qkv
    k_B1SHK, v_B1SHK = whole_kv
    n = q_B1THK.shape[2] // 2
    n_others = k_B1SHK.shape[2] // (2 * n) - 1
    before_J = jnp.arange(n_others) < shard_1[0]

    def own(x: Array) -> Array:  # [2, B, n, ...]
        return jnp.stack([x[:, 0, :n], x[:, 0, n:]])

    def early(x: Array) -> Array:  # [B, C n, ...]
        return x[:, 0, : x.shape[2] // 2]

    def others(x: Array) -> Array:  # [C - 1, B, n, ...]
        chunks = jnp.moveaxis(x[:, 0].reshape(x.shape[0], -1, n, *x.shape[3:]), 1, 0)
        return _choose(before_J, chunks[:n_others], chunks[::-1][1 : n_others + 1])

    q_2BTHK = own(q_B1THK)
    segments_2BT = None if segments is None else own(segments[0])
    keys = own(k_B1THK), early(k_B1SHK), others(k_B1SHK)
    values = own(v_B1THK), early(v_B1SHK), others(v_B1SHK)
    three_segments: _Segments = (None, None, None)
    if segments is not None:
        three_segments = segments_2BT, early(segments[1]), others(segments[1])
    out_2BTHK = _joined(before_J, q_2BTHK, keys, values, three_segments)
    return jnp.moveaxis(out_2BTHK, 0, 1).reshape(q_B1THK.shape)


def _choose(before_J: Array, early: Array, late: Array) -> Array:
    """Return `early` for the shards before this one and `late` for those after it."""
    return jnp.where(before_J.reshape(-1, *[1] * (late.ndim - 1)), early, late)


def _parts(
    before_J: Array, q_2BTHK: Array, keys: _Three, values: _Three, segments: _Segments
) -> tuple[Part, Part, Part]:
    """Return the arguments of the three kernels; some have a dimension in front of the batch."""
    s_2BT = segments[0]
    late_BT = None if s_2BT is None else s_2BT[1]
    own = q_2BTHK, keys[0], values[0], s_2BT, s_2BT
    early = q_2BTHK[1], keys[1], values[1], late_BT, segments[1]
    q_JBTHK = _pick(before_J, q_2BTHK)
    s_JBT = None if s_2BT is None else _pick(before_J, s_2BT)
    return own, early, (q_JBTHK, keys[2], values[2], s_JBT, segments[2])


def _pick(before_J: Array, x_2: Array) -> Array:
    """Return, for each other shard, which of this shard's two chunks meets a chunk of it."""
    return _choose(before_J, x_2[:1], x_2[1:])


@jax.custom_vjp
def _joined(
    before_J: Array, q_2BTHK: Array, keys: _Three, values: _Three, segments: _Segments
) -> Array:
    """Return the attention of a shard's two chunks, from the keys of the three kernels."""
    return _joined_forward(before_J, q_2BTHK, keys, values, segments)[0]


def _joined_forward(
    before_J: Array, q_2BTHK: Array, keys: _Three, values: _Three, segments: _Segments
) -> tuple[Array, _Residuals]:
    own, early, others = _parts(before_J, q_2BTHK, keys, values, segments)
    o1_2BTHK, l1_2BHT = forward_kernel(own, causal=True)
    o2_BTHK, l2_BHT = forward_kernel(early, causal=False)
    o3_JBTHK, l3_JBHT = forward_kernel(others, causal=False)
    nothing = jnp.full_like(l3_JBHT, -jnp.inf)
    first = _join([o1_2BTHK[:1], o3_JBTHK], [l1_2BHT[:1], _choose(before_J, l3_JBHT, nothing)])
    second = _join(
        [o1_2BTHK[1:], o2_BTHK[None], o3_JBTHK],
        [l1_2BHT[1:], l2_BHT[None], _choose(before_J, nothing, l3_JBHT)],
    )
    out_2BTHK, sums_2BHT = (
        checkpoint_name(jnp.stack(pair), SAVED) for pair in zip(first, second, strict=True)
    )
    return out_2BTHK, (before_J, q_2BTHK, keys, values, segments, out_2BTHK, sums_2BHT)


def _join(outs: list[Array], sums: list[Array]) -> tuple[Array, Array]:
    """Return the output and log-sum of the union of key sets, from those of each."""
    out_PBTHK, sums_PBHT = jnp.concatenate(outs), jnp.concatenate(sums)
    sum_BHT = jax.nn.logsumexp(sums_PBHT, axis=0)
    share_PBHT = jnp.exp(sums_PBHT - sum_BHT)
    out_BTHK = jnp.einsum("pbht,pbthk->bthk", share_PBHT, out_PBTHK.astype(jnp.float32))
    return out_BTHK.astype(out_PBTHK.dtype), sum_BHT


def _joined_backward(
    residuals: _Residuals, d_out_2BTHK: Array
) -> tuple[None, Array, _Three, _Three, None]:
    before_J, q_2BTHK, keys, values, segments, out_2BTHK, sums_2BHT = residuals
    own, early, others = _parts(before_J, q_2BTHK, keys, values, segments)
    results = sums_2BHT, out_2BTHK, d_out_2BTHK
    met = (_pick(before_J, x) for x in results)
    dq1_2BTHK, dk1, dv1 = backward_kernel(own, *results, causal=True)
    dq2_BTHK, dk2, dv2 = backward_kernel(early, *(x[1] for x in results), causal=False)
    dq3_JBTHK, dk3, dv3 = backward_kernel(others, *met, causal=False)
    dq3_JBTHK = dq3_JBTHK.astype(jnp.float32)
    zeros = jnp.zeros_like(dq3_JBTHK)
    first = dq1_2BTHK[0] + _choose(before_J, dq3_JBTHK, zeros).sum(0)
    second = dq1_2BTHK[1] + dq2_BTHK + _choose(before_J, zeros, dq3_JBTHK).sum(0)
    dq_2BTHK = jnp.stack([first, second]).astype(q_2BTHK.dtype)
    return None, dq_2BTHK, (dk1, dk2, dk3), (dv1, dv2, dv3), None


_joined.defvjp(_joined_forward, _joined_backward)


def _fold(x: Array) -> Array:
    """Merge all leading dimensions into one of the batch."""
    return x.reshape(-1, *x.shape[-3:])


def _mask(part: Part) -> Array | None:
    """Return True where segments agree `[B, 1, T, S]`, or None without segments."""
    q, k, _, q_segments, k_segments = part
    if q_segments is None or k_segments is None:
        return None
    q_segments_BT = q_segments.reshape(-1, q.shape[-3])
    k_segments_BS = k_segments.reshape(-1, k.shape[-3])
    return _agree(q_segments_BT, k_segments_BS)


def _agree(q_segments_BT: Array, k_segments_BS: Array) -> Array:
    """Return `[B, 1, T, S]`: True where a query and a key are of one segment."""
    return q_segments_BT[:, None, :, None] == k_segments_BS[:, None, None, :]


def forward_kernel(part: Part, *, causal: bool) -> tuple[Array, Array]:
    """Return cuDNN's output `[..., T, H, K]` and the logs of its softmax sums `[..., H, T]`."""
    q, k, v = (_fold(x) for x in part[:3])
    # Not jax.nn.dot_product_attention: it rounds the sums to the format of q.
    out_BTHK, sums_BHT = cudnn.dot_product_attention(
        q, k, v, mask=_mask(part), scale=q.shape[-1] ** -0.5, mask_type=_mask_type(causal=causal),
        return_residual=True,
    )  # fmt: skip
    return out_BTHK.reshape(part[0].shape), sums_BHT.reshape(
        *part[0].shape[:-3], *sums_BHT.shape[1:]
    )


def _mask_type(*, causal: bool) -> cudnn.MaskType:
    return cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK


def backward_kernel(part: Part, sums: Array, out: Array, d_out: Array, *, causal: bool) -> _Three:
    """Return the gradients of q, k, v through the softmax whose output and log-sums are given."""
    arrays = part[:3]
    q, k, v, out, d_out = (_fold(x) for x in (*arrays, out, d_out))
    absent = jnp.zeros(0, q.dtype)
    bias = cudnn.combine_bias_and_mask(None, _mask(part), q.dtype)
    optional = (absent if bias is None else bias, *[absent] * 6)
    grads = cudnn._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, *optional, sums.reshape(-1, *sums.shape[-2:]), out, d_out,
        scale=q.shape[-1] ** -0.5, seed=0, dropout_rate=0.0,
        variadic_args=(bias is not None, False),
        mask_type=_mask_type(causal=causal),
        layout=cudnn.AttentionLayout.BTNH.value, sliding_window_length=None, **_NEWER,
    )  # fmt: skip
    d_q, d_k, d_v = (grad.reshape(x.shape) for grad, x in zip(grads, arrays, strict=True))
    return d_q, d_k, d_v


def assume_gpu(capability: tuple[int, int], version: tuple[int, int, int]) -> None:
    """Make JAX's checks see this GPU's capability and this version of cuDNN, not the machine's."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("."))

    major, minor, patch = version
    cudnn.check_cudnn_version = lambda: 10_000 * major + 100 * minor + patch
    cudnn.check_compute_capability = lambda least: capability >= numbers(least)
    cudnn.is_cuda_compute_capability_equal = lambda other: capability == numbers(other)
