"""Layers that gather the next one's weights ahead equal the plain scan's, to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax.config import schema
from gpt3jax.gradient import accumulation
from gpt3jax.model import gpt, remat
from gpt3jax.sharding import layouts, meshes

import tiny

MODEL = schema.Model(
    n_layers=5, d_model=64, n_heads=4, seq_len=32, vocab_size=128, dropout=0.1,
    attention_dropout=0.1, remat="full", n_loss_chunks=1,
)  # fmt: skip
BANDED = schema.Attention(pattern="alternating", band=8)


def losses_and_grads(model, sizes, compute, with_segments=False):
    """Return loss and gradients by name of a plain scan, and of prefetched layers."""
    mesh = meshes.make_mesh(schema.Mesh(**sizes))
    rng = np.random.default_rng(0)
    shape = 2, 8, model.seq_len
    batch = {
        "tokens": rng.integers(0, model.vocab_size, shape),
        "targets": rng.integers(0, model.vocab_size, shape),
        "positions": np.broadcast_to(np.arange(model.seq_len), shape),
        "weights": rng.random(shape, np.float32),
        "loss_mask": np.ones(shape, np.float32),
        "samples": np.arange(16).reshape(2, 8),
    }
    if with_segments:
        batch["segments"] = rng.integers(0, 2, shape).cumsum(-1)
    batch = jax.tree.map(jnp.asarray, batch)
    with jax.set_mesh(mesh):
        make = lambda: gpt.GPT(model, jax.random.key(0))  # noqa: E731
        shardings = layouts.state_shardings(jax.eval_shape(make), mesh)
        params = jax.jit(make, out_shardings=shardings)()
        results = []
        for prefetch in (False, True):
            own = dataclasses.replace(compute, prefetch=prefetch)

            def step(params, batch, own=own):
                return accumulation.loss_and_grad_sums(params, batch, jax.random.key(1), own)

            loss, grads = jax.jit(step)(params, batch)
            results.append({"loss": np.asarray(loss)} | tiny.leaves(grads))
    return results


FSDP, BOTH = {"data": 1, "fsdp": 8}, {"data": 1, "fsdp": 4, "tensor": 2}
CASES = {
    **{f"fsdp x tensor, {name}": (BOTH, {"remat": name}, {}, False) for name in remat.SAVED},
    "fsdp, bands and a short last period": (FSDP, {"attention": BANDED}, {}, True),
    "16-bit": (FSDP, {"remat": "mlp"}, {"dtype": "bfloat16"}, False),
    **{
        f"8-bit, {name}": (FSDP, {"remat": name}, {"dtype": "bfloat16", "float8": True}, False)
        for name in ("mlp", "none", "full")
    },
    "8-bit but for the ends": (
        FSDP,
        {"attention": BANDED},
        {"float8": True, "end_layers": 1},
        True,
    ),
}
QUICK = ("fsdp x tensor, mlp", "fsdp, bands and a short last period", "16-bit", "8-bit, mlp")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES],
)
def test_it_equals_the_plain_scan_to_the_bit(name):
    sizes, changes, compute, with_segments = CASES[name]
    compute = gpt.Compute(sequence_parallel="tensor" in sizes, **compute)
    model = dataclasses.replace(MODEL, **changes)
    plain, ahead = losses_and_grads(model, sizes, compute, with_segments)
    for array, value in plain.items():
        np.testing.assert_array_equal(ahead[array], value, err_msg=array)


@pytest.mark.parametrize("name", ["mlp", pytest.param("none", marks=pytest.mark.slow)])
def test_it_equals_the_plain_scan_over_a_cut_sequence(name):
    """To rounding: products take the sequence in parts, as it is cut."""
    sizes = {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}
    model = dataclasses.replace(MODEL, remat=name)
    plain, ahead = losses_and_grads(model, sizes, gpt.Compute(sequence_parallel=True), True)
    for array, value in plain.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(ahead[array], value, atol=2e-6 * scale, err_msg=array)


@pytest.mark.parametrize(("name", "n_windows"), [("mlp", 3 + 5), ("dots", 3 + 4)])
def test_the_program_has_the_barriers_of_its_windows(name, n_windows):
    """Without them XLA would gather as late as in a plain scan; each window has two."""
    mesh = meshes.make_mesh(schema.Mesh(data=1, fsdp=8))
    model = dataclasses.replace(MODEL, remat=name)

    def loss(params, tokens):
        compute = gpt.Compute(prefetch=True)
        return params(tokens, jnp.broadcast_to(jnp.arange(32), (8, 32)), compute=compute).sum()

    with jax.set_mesh(mesh):
        params = jax.eval_shape(lambda: gpt.GPT(model, jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32)
        text = jax.jit(jax.grad(loss)).lower(params, tokens).as_text()
    assert text.count("optimization_barrier") >= 2 * n_windows
