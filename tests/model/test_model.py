"""The network against independent ones, and its properties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax.config import schema
from gpt3jax.model import attention, dropout, gpt, remat
from gpt3jax.sharding import layouts

import numpy_gpt
import tiny

TINY = schema.Model(
    n_layers=3, d_model=64, n_heads=4, seq_len=32, vocab_size=251, vocab_multiple=128,
    dropout=0.0, attention_dropout=0.0, remat="full", n_loss_chunks=1,
)  # fmt: skip
VARIANTS = {
    "tanh": {},
    "erf": {"gelu": "erf"},
    "reset": {},
    "window": {"attention": schema.Attention(pattern="alternating", band=8)},
}


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("variant", VARIANTS)
def test_megatron_gives_the_same_logits_loss_and_gradients(variant):
    weights, inputs, expected = numpy_gpt.load_megatron(variant)
    cfg = dataclasses.replace(TINY, mask_padded_vocab=False, **VARIANTS[variant])
    logits, loss, grads = tiny.network(tiny.params_from_numpy(weights, cfg), inputs)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
    numpy_gpt.assert_close({"logits": logits}, {"logits": expected["logits_BTV"]})
    numpy_gpt.assert_close(tiny.to_numpy_names(grads), expected["grads"])


@pytest.mark.usefixtures("full_precision")
def test_hugging_face_gpt2_gives_the_same_logits_loss_and_gradients():
    cfg = dataclasses.replace(TINY, vocab_size=257, seq_len=64)
    weights, inputs, expected = numpy_gpt.load_hf(cfg.padded_vocab_size)
    logits, loss, grads = tiny.network(tiny.params_from_numpy(weights, cfg), inputs)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
    numpy_gpt.assert_close(
        {"logits": logits[..., :257]}, {"logits": expected["logits_BTV"][..., :257]}
    )
    numpy_gpt.assert_close(tiny.to_numpy_names(grads), expected["grads"])


@pytest.mark.parametrize("n_loss_chunks", [1, 4])
@pytest.mark.parametrize(  # several blocks of queries, and one
    "seq_len", [600, pytest.param(32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("pattern", ["dense", "alternating"])
def test_numpy_gives_the_same_on_random_weights(pattern, seq_len, n_loss_chunks):
    cfg = dataclasses.replace(
        TINY, seq_len=seq_len, n_loss_chunks=n_loss_chunks,
        attention=schema.Attention(pattern=pattern, band=seq_len // 3),
    )  # fmt: skip
    rng = np.random.default_rng(seq_len)
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.asarray(rng.standard_normal(p.shape), jnp.float32),
        gpt.GPT(cfg, jax.random.key(1)),
    )
    tokens = rng.integers(0, 251, (2, seq_len + 1))
    allowed = np.ones((2, seq_len, seq_len), bool)
    for i in (7, 20, seq_len - 5):  # documents end here
        allowed[:, i:, :i] = False
    inputs = {
        "tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "allowed_BTS": allowed,
        "loss_mask_BT": (rng.random((2, seq_len)) < 0.8).astype(float),
    }  # fmt: skip
    windows = (gpt.layer_windows(cfg) * 3)[:3]
    loss, _, _, grads = numpy_gpt.loss_and_grads(
        tiny.to_numpy_names(params), vocab_size=251, layer_windows=windows, **inputs
    )
    _, our_loss, our_grads = tiny.network(params, inputs)
    np.testing.assert_allclose(our_loss, loss, rtol=1e-6)
    numpy_gpt.assert_close(tiny.to_numpy_names(our_grads), grads)


def test_no_position_sees_a_later_one():
    cfg = dataclasses.replace(TINY, seq_len=300, n_layers=1)
    params = gpt.GPT(cfg, jax.random.key(0))
    x_BTD = jax.random.normal(jax.random.key(1), (1, 300, 64))

    def last_seen(x, t):
        seen = jax.grad(lambda x: trunk(params, x)[0, t].sum())(x)
        return np.flatnonzero(np.abs(np.asarray(seen)).sum((0, 2)))

    for t in (0, 5, 255, 256, 299):
        np.testing.assert_array_equal(last_seen(x_BTD, t), np.arange(t + 1))


def trunk(params, x_BTD):
    block = jax.tree.map(lambda leaf: leaf[0], params.blocks)
    return block(x_BTD, None, gpt.ForwardArgs())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("full", "dots") else pytest.mark.slow)
        for name in list(remat.SAVED)[1:]
    ],
)
def test_remat_changes_no_gradient(name):
    cfg = dataclasses.replace(TINY, dropout=0.1, attention_dropout=0.1)
    loss, grads, _ = remat_case(dataclasses.replace(cfg, remat=name))
    none_loss, none_grads, _ = remat_case(dataclasses.replace(cfg, remat="none"))
    np.testing.assert_allclose(loss, none_loss, rtol=2e-6)  # GELU has two forms
    for name, grad in tiny.leaves(grads).items():
        scale = np.abs(tiny.leaves(none_grads)[name]).max()
        np.testing.assert_allclose(grad, tiny.leaves(none_grads)[name], atol=2e-6 * scale + 1e-9)


@pytest.mark.slower
def test_remat_policies_save_less_and_less():
    cfg = dataclasses.replace(TINY, dropout=0.1, attention_dropout=0.1, n_layers=8, seq_len=128)
    saved = [remat_case(dataclasses.replace(cfg, remat=r))[2] for r in remat.SAVED]
    assert saved == sorted(saved, reverse=True) and len(set(saved)) == len(saved), saved


def remat_case(cfg):
    """Return loss, gradients, and the bytes that the forward pass keeps for the backward one."""
    params = gpt.GPT(cfg, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 251, (2, cfg.seq_len)))
    noise = dropout.Noise(jax.random.key(1), jnp.arange(2))
    positions = jnp.arange(cfg.seq_len) + 0 * tokens
    weights = jax.random.normal(jax.random.key(2), (*tokens.shape, cfg.d_model))

    def loss(params):
        return (params(tokens, positions, None, noise) * weights).mean()

    kept = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return value, grads, n_bytes


def test_each_parameters_suffix_axes_and_rank_agree():
    abstract = jax.eval_shape(functools.partial(gpt.GPT, TINY), jax.random.key(0))
    is_variable = layouts.is_variable
    variables = jax.tree_util.tree_leaves_with_path(abstract, is_leaf=is_variable)
    letters = {"V": "vocab", "H": "heads", "K": "head_dim", "F": "mlp", "3": None, "T": None}
    sizes = {"V": 256, "H": 4, "K": 16, "F": 256, "3": 3, "T": 32, "D": 64}
    assert len(variables) == len(tiny.NUMPY_NAMES)
    for path, variable in variables:
        name = path[-1].name if hasattr(path[-1], "name") else str(path[-1].key)
        suffix, axes = name.rsplit("_", 1)[1], variable.get_metadata("axes")
        shape = variable.get_value().shape[-len(suffix) :]
        assert len(suffix) == len(axes), name
        assert shape == tuple(sizes[s] for s in suffix), name
        for letter, axis in zip(suffix, axes, strict=True):
            assert axis == letters.get(letter, axis) and (letter != "D" or axis in ("embed", None))
        assert variable.get_metadata("decays") == (name[0] not in "bs"), name


def test_initial_weights_have_the_stated_spread():
    cfg = dataclasses.replace(TINY, d_model=256, init_std=0.006, n_layers=4)
    leaves = tiny.leaves(gpt.GPT(cfg, jax.random.key(0)))
    for name, array in leaves.items():
        std = 0.006 / np.sqrt(8) if name.endswith(("w_out_HKD", "w_down_FD")) else 0.006
        if "/b_" in name or name.endswith("bias_D"):
            assert not array.any(), name
        elif name.endswith("scale_D"):
            assert (array == 1).all(), name
        else:
            np.testing.assert_allclose(array.std(), std, rtol=0.02, err_msg=name)
    layers = leaves["blocks/mlp/w_in_DF"]
    assert not np.array_equal(layers[0], layers[1])


def test_dropout_drops_its_rate_and_nothing_without_noise():
    x = jnp.ones((4, 64, 256))
    noise = dropout.Noise(jax.random.key(0), jnp.arange(4))
    dropped = np.asarray(dropout.apply(x, 0.3, noise))
    np.testing.assert_allclose((dropped == 0).mean(), 0.3, atol=0.01)
    np.testing.assert_allclose(dropped.max(), 1 / 0.7, rtol=1e-4)
    assert len({row.tobytes() for sample in dropped for row in sample}) == 4 * 64
    assert dropout.apply(x, 0.3, None) is x


def test_dropout_follows_the_sample_not_its_place():
    x = jnp.ones((4, 8, 16))
    samples = jnp.array([7, 1, 12, 3])
    all_at_once = dropout.apply(x, 0.5, dropout.Noise(jax.random.key(0), samples))
    alone = dropout.apply(x[:1], 0.5, dropout.Noise(jax.random.key(0), samples[2:3]))
    np.testing.assert_array_equal(all_at_once[2], alone[0])


def test_attention_dropout_drops_probabilities():
    """With all values 1, the output is the kept share of each row, scaled up."""
    q = jax.random.normal(jax.random.key(0), (2, 512, 2, 8))
    noise = dropout.Noise(jax.random.key(1), jnp.arange(2))
    options = attention.Options(implementation="xla", dropout_rate=0.25)
    out = attention.attend(q * 0, q, jnp.ones_like(q), options=options, noise=noise)
    out = np.asarray(out)[:, 64:, :, 0]
    np.testing.assert_allclose(out.mean(), 1, atol=0.01)
    assert 0.02 < out.std() < 0.2


def test_bf16_stays_near_fp32():
    params = gpt.GPT(TINY, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 251, (2, 32)))
    positions = jnp.arange(32) + 0 * tokens
    exact = params(tokens, positions)
    rough = params(tokens, positions, compute=gpt.Compute(dtype="bfloat16"))
    assert rough.dtype == jnp.bfloat16
    error = jnp.linalg.norm(rough.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < error < 0.02, error


def test_a_frequent_tokens_gradient_does_not_vanish_in_bf16():
    """2,048 places of one token: a sum in bf16 would stop growing at 256 times its parts."""
    cfg = dataclasses.replace(TINY, seq_len=512, n_layers=1)
    params = gpt.GPT(cfg, jax.random.key(0))
    tokens = jnp.full((4, 512), 7)
    positions = jnp.arange(512) + 0 * tokens

    def grad(dtype):
        compute = gpt.Compute(dtype=dtype)
        return jax.grad(
            lambda p: p.embed(tokens, positions, None, compute).astype(jnp.float32).sum()
        )(params).embedding_VD[7]

    np.testing.assert_allclose(grad("bfloat16"), grad("float32"), rtol=1e-3)
