"""cuDNN's attention beside XLA's: the same output and gradients, to the format's rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax.model import attention, cudnn_attention

import plain_kernels

LENGTH = 256
WHO_SEES_WHOM = {
    "dense": (None, False),
    "band": (100, False),
    "documents": (None, True),
    "band-documents": (100, True),
}


def results(dtype, d_head, window, documents, attend):
    """Return the output and the gradients of q, k and v; all start from the same values."""
    rng = np.random.default_rng(0)
    arrays = jnp.asarray(rng.standard_normal((4, 2, LENGTH, 2, d_head)), dtype)
    segments = np.cumsum(rng.random((2, LENGTH)) < 0.02, axis=1, dtype=np.int32)

    @jax.jit
    def both(q, k, v, d_out):
        out, pull = jax.vjp(
            lambda *qkv: attend(*qkv, window, segments if documents else None), q, k, v
        )
        return out, *pull(d_out)

    return [np.asarray(x, np.float64) for x in both(*arrays)]


def by(implementation):
    def attend(q, k, v, window, segments):
        options = attention.Options(implementation=implementation, window=window)
        return attention.attend(q, k, v, options=options, segments_BT=segments)

    return attend


def assert_near(ours, theirs, dtype):
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), ours, theirs, strict=True):
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error < max(4 * float(jnp.finfo(dtype).eps), 1e-5), f"{name}: {error}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("d_head", [64, 80, 128])
@pytest.mark.parametrize(("window", "documents"), WHO_SEES_WHOM.values(), ids=WHO_SEES_WHOM)
def test_its_results_are_those_of_xlas_attention(dtype, d_head, window, documents):
    case = dtype, d_head, window, documents
    assert_near(results(*case, by("cudnn")), results(*case, by("xla")), dtype)


def in_shards(n_shards):
    """Return attention by the shards of a sequence cut zig-zag, one after the other."""
    n = LENGTH // (2 * n_shards)

    def attend(q, k, v, window, segments):
        chunks = [None] * (2 * n_shards)
        whole_segments = None if segments is None else jnp.asarray(segments)[:, None]
        for shard in range(n_shards):
            mine = shard, len(chunks) - 1 - shard

            def own(x, mine=mine):
                return jnp.concatenate([x[:, c * n : (c + 1) * n] for c in mine], axis=1)[:, None]

            out = cudnn_attention._attend_shard(
                jnp.array([shard]),
                (own(q), own(k), own(v)),
                (k[:, None], v[:, None]),
                None if segments is None else (own(segments), whole_segments),
            )
            chunks[mine[0]], chunks[mine[1]] = out[:, 0, :n], out[:, 0, n:]
        return jnp.concatenate(chunks, axis=1)

    return attend


@pytest.mark.parametrize(("n_shards", "documents"), [(2, False), (4, True)])
def test_shards_together_are_the_whole(device, monkeypatch, n_shards, documents):
    """One device is enough. On a CPU plain kernels are in the place of cuDNN's."""
    dtype = "bfloat16"
    if device == "cpu":
        monkeypatch.setattr(cudnn_attention, "forward_kernel", plain_kernels.forward)
        monkeypatch.setattr(cudnn_attention, "backward_kernel", plain_kernels.backward)
        dtype = "float32"
    case = dtype, 64, None, documents
    assert_near(results(*case, in_shards(n_shards)), results(*case, by("xla")), dtype)
