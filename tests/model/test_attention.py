"""The plan of blocks; XLA's attention, whose derivative is written out, against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax.model import attention, dropout
from gpt3jax.sharding import sequence

import tiny

T, H = 600, 2  # three blocks of queries, the last one shorter
CASES = [
    {},
    {"window": 70},
    {"dropout_rate": 0.3},
    {"dropout_rate": 0.3, "window": 300, "documents": True},
]


def starts_of(context, n_positions, window):
    """Return where chunks of queries and their keys start on each shard."""
    mesh = tiny.make_mesh(data=1, context=context, fsdp=8 // context)
    with jax.set_mesh(mesh):
        n_before = n_positions if window is None else window
        queries = sequence.chunk_starts(n_positions)
        return queries, sequence.stretch_starts(n_positions, n_before)


@pytest.mark.parametrize("window", [None, 1, 5, 70, 2000])
@pytest.mark.parametrize("context", [1, 2, 4, 8])
@pytest.mark.parametrize("query_block", [3, 32, 256])
def test_blocks_read_every_visible_key_once(monkeypatch, query_block, context, window):
    """Counts how often each (query, key) is scored, over the blocks of all shards."""
    n_positions = 320
    monkeypatch.setattr(attention, "QUERY_BLOCK", query_block)
    query_starts_CR, key_starts_CR = starts_of(context, n_positions, window)
    length = n_positions // query_starts_CR.size
    blocks = list(attention.plan_blocks(query_starts_CR, key_starts_CR, length, window))
    # The sizes of arrays, and so the program, are the same on every shard: queries in order.
    places = np.concatenate(
        [np.arange(block.queries.start, block.queries.stop) for block in blocks]
    )
    np.testing.assert_array_equal(places, np.arange(n_positions // context))
    counts_TS = np.zeros((n_positions, n_positions), int)
    for shard in range(context):
        for block in blocks:
            n_queries, n_keys = (part.stop - part.start for part in (block.queries, block.keys))
            assert 0 < n_queries <= query_block
            t, s = block.query_starts[shard], block.key_starts[shard]
            # What the positions say is what the slices read.
            within = block.queries.start - block.chunk * length
            assert t == query_starts_CR[shard, block.chunk] + within
            assert s == key_starts_CR[shard, block.chunk] + block.keys.start
            assert s >= 0 and s + n_keys <= n_positions
            counts_TS[t : t + n_queries, s : s + n_keys] += 1
    t, s = np.arange(n_positions)[:, None], np.arange(n_positions)
    visible_TS = (s <= t) & (t - s <= (n_positions if window is None else window))
    assert (counts_TS[visible_TS] == 1).all(), "a visible key is read by no block, or by two"
    assert counts_TS.max() == 1, "a key is read twice"
    if context == 1:
        assert attention.n_scores(n_positions, window) == counts_TS.sum()


@pytest.mark.parametrize("window", [None, 5, 70])
def test_one_shards_blocks_read_no_key_that_all_their_queries_hide(window):
    start_11 = np.zeros((1, 1), np.int32)
    for block in attention.plan_blocks(start_11, start_11, 1000, window):
        first = 0 if window is None else max(0, block.queries.start - window)
        assert (block.keys.start, block.keys.stop) == (first, block.queries.stop)


def plain(q, k, v, *, window=None, dropout_rate=0.0, segments_BT=None, noise=None):
    """Attention as one writes it down: every score, its softmax, its dropout."""
    t, s = jnp.arange(T)[:, None], jnp.arange(T)[None]
    visible = (s <= t) & (t - s <= (T if window is None else window))
    if segments_BT is not None:
        visible = visible & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    probs = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    if dropout_rate:
        words = dropout.row_words(noise, jnp.arange(T), H)
        keep = dropout.kept(words, jnp.arange(T), dropout_rate)
        probs = probs * jnp.moveaxis(keep, 2, 1) / dropout.kept_share(dropout_rate)
    return jnp.einsum("bhts,bshk->bthk", probs, v)


def attend(q, k, v, *, segments_BT=None, noise=None, **options):
    options = attention.Options(implementation="xla", **options)
    return attention.attend(q, k, v, options=options, segments_BT=segments_BT, noise=noise)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_equal_plain_attentions(case):
    case = dict(case)
    rng = np.random.default_rng(0)
    q, k, v, weights = rng.standard_normal((4, 2, T, H, 8)).astype(np.float32)
    case["noise"] = dropout.Noise(jax.random.key(0), jnp.array([5, 9]))
    if case.pop("documents", False):
        case["segments_BT"] = np.cumsum(rng.random((2, T)) < 0.01, axis=1)

    def results(function):
        def weighted(*arrays):
            out = function(*arrays, **case)
            return (out * weights).sum(), out

        (_, out), grads = jax.jit(
            jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)
        )(q, k, v)  # fmt: skip
        return out, *grads

    with jax.set_mesh(tiny.make_mesh()):
        ours = results(attend)
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, results(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_gradients_are_as_near_to_fp32s_as_the_format_allows(dtype):
    rng = np.random.default_rng(1)
    arrays = [jnp.asarray(x, dtype) for x in rng.standard_normal((4, 2, T, H, 8))]
    noise = dropout.Noise(jax.random.key(0), jnp.arange(2))

    def gradients(*arrays):
        def weighted(q, k, v):
            out = attend(q, k, v, dropout_rate=0.1, noise=noise)
            return jnp.vdot(out, arrays[3], preferred_element_type=jnp.float32)

        return jax.jit(jax.grad(weighted, argnums=(0, 1, 2)))(*arrays[:3])

    with jax.set_mesh(tiny.make_mesh()):
        short = gradients(*arrays)
        exact = gradients(*(x.astype(jnp.float32) for x in arrays))
    for a, b in zip(short, exact, strict=True):
        assert a.dtype == dtype
        error = np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()
        assert error < 4 * float(jnp.finfo(dtype).eps)
