"""Products in 8 bits: rounding, scales and gradients against NumPy, whole networks, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax.config import schema
from gpt3jax.model import float8, gpt
from gpt3jax.sharding import meshes

import numpy_gpt
import tiny

# Stored bits of the significand, the exponent of the smallest normal value, of the largest value.
FORMATS = {"e4m3": (3, -6, 8), "e5m2": (2, -14, 15)}
OURS = {"e4m3": float8.E4M3, "e5m2": float8.E5M2}


def scale_of(x, kind):
    """Return the power of two that brings the largest value to half of 2^largest or above."""
    return 2.0 ** (np.frexp(np.abs(x).max())[1] - FORMATS[kind][2])


def rounded(x, kind, scale=None):
    """Return values as the format holds them once scaled, to nearest and ties to even."""
    n_bits, smallest, _ = FORMATS[kind]
    scale = scale_of(x, kind) if scale is None else scale
    exponent = np.frexp(x / scale)[1] - 1
    step = 2.0 ** (np.maximum(exponent, smallest) - n_bits)
    return np.round(x / scale / step) * step * scale


def values(rng, *shape):
    """Return random values of very different sizes, some of them too small for 8 bits, fp32."""
    return (rng.standard_normal(shape) * np.exp(2.5 * rng.standard_normal(shape))).astype(
        np.float32
    )


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [1e-30, 3e-7, 1.0, 5e4])
def test_values_are_rounded_as_numpy_rounds_them(kind, size):
    x = values(np.random.default_rng(0), 64, 128) * np.float32(size)
    ours = float8.in_parts(jnp.asarray(x), OURS[kind], (None, None))
    assert ours.scale.shape == (1, 1) and float(ours.scale[0, 0]) == scale_of(x, kind)
    np.testing.assert_array_equal(ours.value("float32"), rounded(x.astype(np.float64), kind))
    assert np.isfinite(ours.values.astype("float32")).all(), "nothing overflows"
    assert kind == "e5m2" or (np.asarray(ours.value("float32")) == 0).any(), "some are too small"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_scale_changes_the_rounding_of_small_values_alone(kind):
    """So that devices may scale their parts by themselves."""
    x = values(np.random.default_rng(1), 1000)
    small = np.abs(x) < np.abs(x).max() * 2.0 ** (FORMATS[kind][1] + 1 - FORMATS[kind][2])
    assert 0 < small.mean() < 0.5
    one, other = (rounded(x.astype(np.float64), kind, scale_of(x, kind) * by) for by in (1, 0.25))
    np.testing.assert_array_equal(one[~small], other[~small])
    assert kind == "e5m2" or (one[small] != other[small]).any()


@pytest.mark.parametrize("largest", [0.0, np.inf, np.nan])
def test_zeros_stay_zeros_and_what_is_not_finite_is_seen(largest):
    x = jnp.asarray([[0.0, -1.0 if largest else 0.0, largest]])
    ours = float8.in_parts(x, float8.E4M3, (None, None)).value("float32")
    assert np.isfinite(ours).all() if largest == 0 else not np.isfinite(ours).all()


@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape"),
    [
        ("btd,dchk->btchk", (2, 8, 16), (16, 3, 2, 4)),
        ("bthk,hkd->btd", (2, 8, 2, 4), (2, 4, 16)),
        ("btd,df->btf", (2, 8, 16), (16, 24)),
        ("btf,fd->btd", (2, 8, 24), (24, 16)),
    ],
)
def test_products_and_gradients_are_those_of_rounded_values(equation, x_shape, w_shape):
    rng = np.random.default_rng(2)
    x, w = values(rng, *x_shape), values(rng, *w_shape)
    compute = gpt.Compute(float8=True)

    def product(x, w):
        return gpt.product(equation, x, gpt.nnx.Param(w), compute)

    out, pullback = jax.vjp(product, jnp.asarray(x), jnp.asarray(w))
    d_out = values(rng, *out.shape)
    d_x, d_w = pullback(jnp.asarray(d_out))
    x8, w8 = (rounded(a.astype(np.float64), "e4m3") for a in (x, w))
    g8 = rounded(d_out.astype(np.float64), "e5m2")
    left, right, result = equation.replace("->", ",").split(",")
    for ours, expected in (
        (out, np.einsum(equation, x8, w8)),
        (d_x, np.einsum(f"{result},{right}->{left}", g8, w8)),
        (d_w, np.einsum(f"{left},{result}->{right}", x8, g8)),
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


# Which format the operands have in the NumPy GPT's products with weights, forward and backward.
PRODUCTS = {
    "btd,dchk->cbthk": ("e4m3", "e4m3"),
    "bthk,hkd->btd": ("e4m3", "e4m3"),
    "btd,df->btf": ("e4m3", "e4m3"),
    "btf,fd->btd": ("e4m3", "e4m3"),
    "cbthk,dchk->btd": ("e5m2", "e4m3"),
    "btd,hkd->bthk": ("e5m2", "e4m3"),
    "btf,df->btd": ("e5m2", "e4m3"),
    "btd,fd->btf": ("e5m2", "e4m3"),
    "btd,cbthk->dchk": ("e4m3", "e5m2"),
    "bthk,btd->hkd": ("e4m3", "e5m2"),
    "btd,btf->df": ("e4m3", "e5m2"),
    "btf,btd->fd": ("e4m3", "e5m2"),
}


@pytest.mark.parametrize("remat", ["none", "mlp", "full"])
def test_a_network_is_numpys_with_rounded_operands(remat, monkeypatch):
    """To what values near the middle of two of the format do, which fp32 rounds to either."""
    model = schema.Model(
        n_layers=2, d_model=32, n_heads=2, seq_len=16, vocab_size=60, vocab_multiple=4,
        dropout=0.0, attention_dropout=0.0, remat=remat, n_loss_chunks=1,
    )  # fmt: skip
    params = tiny.random_params(model)
    tokens, targets = np.random.default_rng(4).integers(60, size=(2, 3, 16))
    inputs = {"tokens_BT": tokens, "targets_BT": targets}
    weights, plain = tiny.to_numpy_names(params), numpy_gpt._einsum
    exact = numpy_gpt.loss_and_grads(weights, **inputs, vocab_size=60)
    seen = set()

    def in_8_bits(equation, *arrays):
        if kinds := PRODUCTS.get(equation):
            seen.add(equation)
            arrays = [rounded(a, kind) for a, kind in zip(arrays, kinds, strict=True)]
        return plain(equation, *arrays)

    monkeypatch.setattr(numpy_gpt, "_einsum", in_8_bits)
    expected = numpy_gpt.loss_and_grads(weights, **inputs, vocab_size=60)
    assert seen == PRODUCTS.keys()
    _, loss, grads = tiny.network(params, inputs, gpt.Compute(float8=True))
    assert loss == pytest.approx(expected[0], rel=1e-4)
    assert abs(expected[0] - exact[0]) > 10 * abs(loss - expected[0])
    for name, grad in tiny.to_numpy_names(grads).items():
        size = np.linalg.norm(expected[-1][name])
        assert np.linalg.norm(grad - expected[-1][name]) < 0.02 * size, name
        if name.startswith("blocks/w"):
            assert np.linalg.norm(exact[-1][name] - expected[-1][name]) > 0.04 * size, name


def test_each_device_scales_its_own_part():
    """Of a tensor cut over batch, sequence and heads, against NumPy's of each part."""
    x = values(np.random.default_rng(5), 4, 8, 6, 5)
    axes = ("batch", "seq", "heads", "head_dim")
    with jax.set_mesh(meshes.make_mesh(schema.Mesh(data=1, fsdp=2, context=2, tensor=2))):
        ours = jax.jit(lambda x: float8.in_parts(x, float8.E4M3, axes))(x)
        value = jax.jit(lambda scaled: scaled.value("float32"))(ours)
    assert ours.scale.shape == (2, 2, 2, 1)
    for i, j, k in np.ndindex(2, 2, 2):
        place = np.s_[2 * i : 2 * i + 2, 4 * j : 4 * j + 4, 3 * k : 3 * k + 3]
        assert float(ours.scale[i, j, k, 0]) == scale_of(x[place], "e4m3")
        np.testing.assert_array_equal(value[place], rounded(x[place].astype(np.float64), "e4m3"))
    assert len(np.unique(ours.scale)) > 1


def test_matrices_that_are_gathered_have_one_scale_a_layer_on_every_mesh():
    x = values(np.random.default_rng(6), 3, 8, 4)
    with jax.set_mesh(meshes.make_mesh(schema.Mesh(data=1, fsdp=4, tensor=2))):
        ours = jax.jit(float8.in_layers)(x)
    for layer in range(3):
        assert float(ours.scale[layer]) == scale_of(x[layer], "e4m3")
        value = ours.values[layer].astype("float32") * ours.scale[layer]
        np.testing.assert_array_equal(value, rounded(x[layer].astype(np.float64), "e4m3"))


@pytest.mark.parametrize("pattern", ["dense", "alternating"])
def test_layers_at_the_ends_stay_in_the_compute_format(pattern):
    """As if each layer were run by itself, in its own format and with its own window."""
    model = schema.Model(
        n_layers=5, d_model=32, n_heads=2, seq_len=16, vocab_size=60, dropout=0.0,
        attention_dropout=0.0, remat="full",
        attention=schema.Attention(pattern=pattern, band=3),
    )  # fmt: skip
    params, plain = tiny.random_params(model), gpt.Compute()
    x = jnp.asarray(np.random.default_rng(7).standard_normal((2, 16, 32)), jnp.float32)
    compute = dataclasses.replace(plain, float8=True, end_layers=1)
    ours, _ = params.run_layers(params.blocks, jnp.arange(5), x, gpt.ForwardArgs(compute=compute))
    expected, all_8_bits = x, x
    in_8_bits = gpt.ForwardArgs(compute=dataclasses.replace(plain, float8=True))
    for i in range(5):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params.blocks)
        window = gpt.layer_windows(model, i)[0]
        args = in_8_bits if i in (1, 2, 3) else gpt.ForwardArgs(compute=plain)
        expected = block(expected, window, args)
        all_8_bits = block(all_8_bits, window, in_8_bits)
    apart = np.linalg.norm(ours - all_8_bits)
    assert np.linalg.norm(ours - expected) < 0.1 * apart
