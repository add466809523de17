"""XLA's attention, whose derivative is written out, against plain attention and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax.model import attention, dropout

import tiny

T, H = 600, 2  # three blocks of queries, the last one shorter
CASES = [
    {},
    {"window": 70},
    {"dropout_rate": 0.3},
    {"dropout_rate": 0.3, "window": 300, "documents": True},
]


def plain(q, k, v, *, window=None, dropout_rate=0.0, segments_BT=None, noise=None):
    """Attention as one writes it down: every score, its softmax, its dropout."""
    t, s = jnp.arange(T)[:, None], jnp.arange(T)[None]
    visible = (s <= t) & (t - s <= (T if window is None else window))
    if segments_BT is not None:
        visible = visible & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    probs = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    if dropout_rate:
        keep = dropout.keep_mask(noise, dropout_rate, jnp.arange(T), (H,), T)
        probs = probs * jnp.moveaxis(keep, 2, 1) / (1 - dropout_rate)
    return jnp.einsum("bhts,bshk->bthk", probs, v)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_those_of_plain_attention(case):
    case = dict(case)
    rng = np.random.default_rng(0)
    q, k, v, weights = rng.standard_normal((4, 2, T, H, 8)).astype(np.float32)
    case["noise"] = dropout.Noise(jax.random.key(0), jnp.array([5, 9]))
    if case.pop("documents", False):
        case["segments_BT"] = np.cumsum(rng.random((2, T)) < 0.01, axis=1)

    def results(attend):
        def weighted(*arrays):
            out = attend(*arrays, **case)
            return (out * weights).sum(), out

        (_, out), grads = jax.jit(
            jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)
        )(q, k, v)  # fmt: skip
        return out, *grads

    with jax.set_mesh(tiny.make_mesh()):
        ours = results(
            lambda *arrays, **how: attention.attend(*arrays, implementation="xla", **how)
        )
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, results(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_gradients_are_as_near_to_fp32s_as_the_format_allows(dtype):
    rng = np.random.default_rng(1)
    arrays = [jnp.asarray(x, dtype) for x in rng.standard_normal((4, 2, T, H, 8))]
    noise = dropout.Noise(jax.random.key(0), jnp.arange(2))

    def gradients(*arrays):
        def weighted(q, k, v):
            out = attention.attend(
                q, k, v, implementation="xla", dropout_rate=0.1, noise=noise
            )  # fmt: skip
            return jnp.vdot(out, arrays[3], preferred_element_type=jnp.float32)

        return jax.jit(jax.grad(weighted, argnums=(0, 1, 2)))(*arrays[:3])

    with jax.set_mesh(tiny.make_mesh()):
        short = gradients(*arrays)
        exact = gradients(*(x.astype(jnp.float32) for x in arrays))
    for a, b in zip(short, exact, strict=True):
        assert a.dtype == dtype
        error = np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()
        assert error < 4 * float(jnp.finfo(dtype).eps)
