"""Our kernels against attention in NumPy's float64: in Triton's interpreter, and on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.model import attention, dropout, triton_attention
from gpt3jax.sharding import sequence

import tiny
import triton_interpreter
from numpy_dropout import numpy_bits

NAMES = ("out", "d_q", "d_k", "d_v")


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of 2 rows, and who sees whom in it."""

    length: int = 192
    heads: int = 1
    d_head: int = 64
    dtype: str = "float16"
    window: int | None = None
    documents: bool = False
    rate: float = 0.1


CASES = [
    Case(heads=2, length=256),
    Case(rate=0.0, dtype="bfloat16"),
    Case(window=70, d_head=80),
    Case(documents=True, d_head=96, dtype="bfloat16"),
    Case(documents=True, window=5, d_head=128),
    Case(length=48, d_head=16, rate=0.5),
    Case(length=128, rate=0.99, dtype="bfloat16"),
]
MORE = [
    Case(512, 2, d_head, dtype, window, documents, rate)
    for d_head in (64, 80, 96, 128)
    for dtype in ("float16", "bfloat16")
    for window, documents, rate in ((None, True, 0.1), (200, False, 0.1), (130, True, 0.0))
]


@pytest.fixture(autouse=True)
def interpreted(device, monkeypatch):
    if device == "cpu":
        triton_interpreter.kernels()
        monkeypatch.setattr(triton_attention, "_call", triton_interpreter.call)


def inputs(case):
    """Return q, k, v, the output's gradient, random words and segments of a case."""
    rng = np.random.default_rng(0)
    shape = 2, case.length, case.heads, case.d_head
    arrays = [jnp.asarray(x, case.dtype) for x in rng.standard_normal((4, *shape))]
    words = rng.integers(0, 2**32, (*shape[:3], 2), dtype=np.uint32)
    segments = np.cumsum(rng.random(shape[:2]) < 0.02, axis=1, dtype=np.int32)
    return arrays, words, segments if case.documents else None


def kernels(case):
    """Return the kernels' output and the gradients of q, k and v."""
    arrays, words, segments = inputs(case)

    def attend(q, k, v):
        return triton_attention.attend(
            q, k, v, window=case.window, segments_BT=segments, words_BTH2=words, rate=case.rate
        )

    @jax.jit
    def both(q, k, v, d_out):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    results = both(*arrays)
    assert [x.dtype for x in results] == [case.dtype] * 4
    return [np.asarray(x, np.float64) for x in results]


def visible(case, segments):
    """Return bools `[B or 1, 1, T, S]`: whether a query sees a key."""
    t, s = np.arange(case.length)[:, None], np.arange(case.length)
    seen = (s <= t) & (t - s <= (case.length if case.window is None else case.window))
    if segments is None:
        return seen[None, None]
    return seen & (segments[:, None, :, None] == segments[:, None, None, :])


def bits(words, length):
    """Return the 16 bits of each probability, `[B, H, T, S]`."""
    a, b = np.moveaxis(words, (3, 2), (0, 2))
    return numpy_bits((a, b), range(length))


def kept(words, length, rate):
    """Return bools `[B, H, T, S]`."""
    return bits(words, length) >= dropout.threshold(rate)


def exact(case):
    """Return the same results in float64: every score, its softmax, its dropout."""
    arrays, words, segments = inputs(case)
    q, k, v, d_out = (np.asarray(x, np.float64) for x in arrays)
    scale = case.d_head**-0.5
    scores = np.einsum("bthk,bshk->bhts", q, k) * scale
    scores = np.where(visible(case, segments), scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    factors = kept(words, case.length, case.rate) / dropout.kept_share(case.rate)
    d_probs = np.einsum("bthk,bshk->bhts", d_out, v) * factors
    d_scores = probs * (d_probs - (probs * d_probs).sum(-1, keepdims=True)) * scale
    return [
        np.einsum("bhts,bshk->bthk", probs * factors, v),
        np.einsum("bhts,bshk->bthk", d_scores, k),
        np.einsum("bhts,bthk->bshk", d_scores, q),
        np.einsum("bhts,bthk->bshk", probs * factors, d_out),
    ]


def assert_near(ours, theirs, dtype):
    """Compare with the largest value, of which the format's rounding is a share."""
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error < 4 * float(jnp.finfo(dtype).eps), f"{name}: {error}"


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slower) for case in MORE)], ids=str
)
def test_output_and_gradients_are_those_of_float64(case):
    assert_near(kernels(case), exact(case), case.dtype)


def test_queries_of_which_nothing_is_kept_give_zeros():
    case = Case(length=128, rate=0.99, dtype="bfloat16")
    out, *gradients = kernels(case)
    seen = kept(inputs(case)[1], case.length, case.rate) & visible(case, None)
    nothing = np.moveaxis(~seen.any(-1), 1, 2)
    assert 0.4 < nothing.mean() < 0.7
    assert (out[nothing] == 0).all() and (out[~nothing] != 0).any(-1).all()
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("sizes", [(128, 64), (16, 32), (64, 16)], ids=str)
@pytest.mark.parametrize("rate", [0.1, 0.99999, None])
def test_masks_are_numpys_bit_for_bit(monkeypatch, sizes, rate):
    """Reads them out of the kernels of the output and of the values' gradients.

    All scores are equal. Each head's values are a unit matrix for 64 of the keys, so that its
    output is its mask for these; likewise with the gradient of the output. The last rate is the
    largest that keeps a certain key.
    """
    length, d_head = 128, 64
    tile = triton_attention.Tile(*sizes, n_warps=4, n_stages=2)
    monkeypatch.setattr(triton_attention, "tiles", lambda *_: (tile,) * 3)
    words = np.random.default_rng(1).integers(0, 2**32, (1, length, 2, 2), dtype=np.uint32)
    if rate is None:
        rate = bits(words, length)[0, 0, 90, 40] / 65536
    units = jnp.eye(length, dtype="bfloat16").reshape(1, length, 2, d_head)
    zeros = jnp.zeros_like(units)

    def attend(v):
        return triton_attention.attend(zeros, zeros, v, words_BTH2=words, rate=rate)

    out, pull = jax.vjp(attend, units)
    (d_v,) = pull(units)
    expected = (kept(words, length, rate) & np.tri(length, dtype=bool))[0]
    for head in range(2):
        part = slice(head * d_head, (head + 1) * d_head)
        np.testing.assert_array_equal(np.asarray(out)[0, :, head] != 0, expected[head][:, part])
        np.testing.assert_array_equal(np.asarray(d_v)[0, :, head] != 0, expected[head][part].T)


def test_results_repeat_to_the_bit():
    case = Case(length=512, heads=2, documents=True)
    for first, again in zip(kernels(case), kernels(case), strict=True):
        np.testing.assert_array_equal(first, again)


def test_results_do_not_depend_on_the_blocks(monkeypatch):
    case = Case(length=128, window=40, documents=True)
    usual = kernels(case)
    tile = triton_attention.Tile(32, 16, n_warps=4, n_stages=2)
    monkeypatch.setattr(triton_attention, "tiles", lambda *_: (tile,) * 3)
    assert_near(kernels(case), usual, case.dtype)


@pytest.mark.parametrize("length", [16, 48, 1024, 2048])
@pytest.mark.parametrize("d_head", [16, 64, 72, 128])
def test_blocks_divide_what_is_served(length, d_head):
    assert triton_attention.refusal(length, d_head, "bfloat16") == ""
    for tile in triton_attention.tiles(length, d_head):
        assert length % tile.queries == 0 and length % tile.keys == 0
        assert min(tile.queries, tile.keys) >= 16, "Triton multiplies no smaller blocks"


@pytest.mark.parametrize("capability", [None, (9, 0), (8, 6), (8, 9), (12, 0)])
def test_large_heads_are_refused_by_gpus_with_little_shared_memory(monkeypatch, capability):
    monkeypatch.setattr(triton_attention, "_capability", None)
    if capability:
        triton_attention.assume_gpu(capability)
    assert not triton_attention.refusal(1024, 64, "float16")
    reason = triton_attention.refusal(1024, 80, "float16")
    assert ("d_head=80 needs more shared memory" in reason) == (capability not in (None, (9, 0)))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((1000, 64, "float16"), "1000 consecutive positions on a GPU must be a multiple of 16"),
        ((1024, 60, "float16"), "d_head=60 must be a multiple of 8 from 16 to 128"),
        ((1024, 256, "bfloat16"), "d_head=256 must be a multiple of 8 from 16 to 128"),
        ((1024, 64, "float32"), "computes in float16 or bfloat16, not in float32"),
    ],
)
def test_what_is_not_served_is_refused(sizes, reason):
    assert reason in triton_attention.refusal(*sizes)


def test_the_refusal_is_of_a_chunk_of_the_split_sequence():
    model = schema.Model(
        n_layers=1, d_model=128, n_heads=2, seq_len=96, vocab_size=100, attention_dropout=0.1,
        attention=schema.Attention(implementation="triton"),
    )  # fmt: skip
    choose = functools.partial(attention.choose, model, "bfloat16", "gpu")
    assert choose(1) == choose(3) == "triton"
    with pytest.raises(errors.UserError, match="24 consecutive positions on a GPU"):
        choose(2)


MESHES = {
    "data4-tensor2": {"data": 4, "tensor": 2},
    "fsdp4-context2": {"data": 1, "fsdp": 4, "context": 2},
    "context4-tensor2": {"data": 1, "context": 4, "tensor": 2},
}


def layer(axes, rows, *, documents, window, implementation="triton"):
    """Return the output and the gradients of a layer's attention, in the sequence's true order."""
    rng = np.random.default_rng(2)
    n, heads = 128, 2
    arrays = [jnp.asarray(x, "float16") for x in rng.standard_normal((4, rows, n, heads, 16))]
    documents_BT = np.cumsum(rng.random((rows, n)) < 0.02, axis=1, dtype=np.int32)
    segments = documents_BT if documents else None
    options = attention.Options(
        implementation=implementation, window=window, dropout_rate=0.1, gather_again=documents
    )
    noise = dropout.Noise(jax.random.key(0), jnp.array([2**31 - 1, 3, 1, 4])[:rows])
    with jax.set_mesh(tiny.make_mesh(**axes)):
        order = np.asarray(sequence.sequence_order(n))

        @jax.jit
        def both(q, k, v, d_out, segments):
            def attend(q, k, v):
                return attention.attend(
                    q, k, v, options=options, segments_BT=segments, noise=noise
                )  # fmt: skip

            out, pull = jax.vjp(attend, q, k, v)
            return out, *pull(d_out)

        own_segments = None if segments is None else segments[:, order]
        results = both(*(x[:, order] for x in arrays), own_segments)
        return [np.asarray(x, np.float64)[:, np.argsort(order)] for x in results]


@pytest.mark.parametrize(("documents", "window"), [(False, None), (True, 37)])
@pytest.mark.parametrize("mesh", MESHES)
def test_results_do_not_depend_on_the_mesh(mesh, documents, window):
    """Also where the backward pass gathers the keys again."""
    axes = MESHES[mesh]
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    case = {"rows": axes["data"] * axes.get("fsdp", 1), "documents": documents, "window": window}
    assert_near(layer(axes, **case), layer({}, **case), "float16")


def test_results_are_those_of_xlas_attention():
    """With the same masks, which both make of the same noise."""
    case = {"rows": 2, "documents": True, "window": 37}
    assert_near(layer({}, **case), layer({}, **case, implementation="xla"), "float16")
