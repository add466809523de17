"""One loss on every mesh there is: all 35 ways to cut 8 devices, and combinations of features."""

import functools

import numpy as np
import pytest

from gpt3jax import step
from gpt3jax.config import schema
from gpt3jax.sharding import meshes, rules

import tiny

N_STEPS = 5


def factors(n, n_axes=5):
    """Yield every way to write n as a product of axes."""
    if n_axes == 1:
        yield (n,)
        return
    for first in (d for d in range(1, n + 1) if n % d == 0):
        yield from ((first, *rest) for rest in factors(n // first, n_axes - 1))


ALL = list(factors(8))


def named(sizes):
    return "-".join(
        f"{axis}{size}" for axis, size in zip(meshes.AXES, sizes, strict=True) if size > 1
    )


def speed_of(sizes):
    """Return the mark of a mesh: mixes of three axes are tested in CI."""
    return pytest.mark.slow if sum(size > 1 for size in sizes) == 3 else pytest.mark.slower


def params_of(all_meshes):
    return [pytest.param(m, id=named(m), marks=speed_of(m)) for m in all_meshes]


def config_of(sizes, groups):
    axes = dict(zip(meshes.AXES, sizes, strict=True)) if sizes else {}
    model = {"n_layers": 8, "d_model": 32, "n_heads": 8, **groups.get("model", {})}
    mesh = axes | groups.get("mesh", {})
    batch = {"microbatch_size": 1} | groups.get("batch", {})
    rest = {k: v for k, v in groups.items() if k not in ("model", "mesh", "batch")}
    return tiny.make_config(model=model, mesh=mesh, batch=batch, **rest)


def run(sizes, groups, documents=False):
    """Return the initial and last weights, and losses and gradient norms of the steps."""
    cfg = config_of(sizes, groups)
    axes = dict(zip(meshes.AXES, sizes, strict=True)) if sizes else {}
    mesh = tiny.make_mesh(**axes)
    program = step.build(cfg, mesh, cfg.train.n_steps * cfg.batch.global_batch_size)
    state = program.init()
    initial, told = tiny.leaves(state.params), []
    rows = cfg.batch.microbatch_size * rules.data_parallel_size(mesh)
    for i in range(N_STEPS):
        n = cfg.batch.global_batch_size // rows if sizes else 1
        batch = tiny.make_batch(i, cfg, mesh, n, masked=documents)
        if documents:
            batch = tiny.add_documents(batch)
        state, metrics = program.train(state, batch)
        told.append((metrics["loss"], metrics["grad_norm"]))
    return initial, tiny.leaves(state.params), np.array(told, np.float64)


@functools.cache
def on_one_device(variant):
    groups, documents = VARIANTS[variant]
    alone = {k: v for k, v in groups.items() if k != "mesh"}
    return run((), alone, documents)


VARIANTS = {
    "plain": ({}, False),
    "documents": ({}, True),
    "alternating": (
        {"model": {"attention": schema.Attention(pattern="alternating", band=5)}},
        True,
    ),
    "bfloat16": ({"precision": {"compute_dtype": "bfloat16"}}, False),
    "float16": ({"precision": {"compute_dtype": "float16", "initial_loss_scale": 2.0**10}}, False),
    "remat": ({"model": {"remat": "dots", "n_loss_chunks": 2}}, False),
}


def check(sizes, variant, rtol=1e-5, **mesh):
    groups, documents = VARIANTS[variant]
    initial, weights, told = run(sizes, {**groups, "mesh": mesh}, documents)
    initial_of_one, weights_of_one, told_of_one = on_one_device(variant)
    for name, array in initial.items():
        other = initial_of_one[name].reshape(array.shape)
        np.testing.assert_array_equal(array, other, err_msg=name)
    np.testing.assert_allclose(told, told_of_one, rtol=rtol)
    # In 16 bits some gradients, as of the bias of keys, are rounding noise, which Adam scales up.
    for name, array in weights.items() if rtol <= 1e-5 else ():
        other = weights_of_one[name].reshape(array.shape)
        error = np.linalg.norm(array - other) / np.linalg.norm(
            other - initial_of_one[name].reshape(array.shape)
        )
        assert error < 100 * rtol, f"{name}: {error}"


MIXED = [(2, 2, 1, 1, 2), (1, 2, 2, 2, 1), (2, 1, 2, 2, 1), (1, 4, 1, 1, 2), (1, 1, 2, 2, 2)]


@pytest.mark.slower
@pytest.mark.parametrize("sizes", MIXED, ids=named)
@pytest.mark.parametrize(
    ("variant", "rtol"),
    [
        ("documents", 1e-5),
        ("alternating", 1e-5),
        ("remat", 1e-5),
        # Products of 16-bit numbers are rounded before they are summed over another cut.
        ("bfloat16", 4e-3),
        ("float16", 1e-3),
    ],
)
def test_features_do_not_depend_on_the_mesh(variant, rtol, sizes):
    check(sizes, variant, rtol)


def test_there_are_35_meshes():
    assert len(ALL) == len(set(ALL)) == 35


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((8, 1, 1, 1, 1), marks=pytest.mark.slow),
        pytest.param((2, 1, 2, 1, 2), marks=pytest.mark.slow),
        pytest.param((2, 2, 2, 1, 1), marks=pytest.mark.slow),
        pytest.param((4, 1, 1, 2, 1), marks=pytest.mark.slow),
    ],
    ids=named,
)
def test_a_sharded_optimizer_changes_nothing(sizes):
    check(sizes, "plain", shard_optimizer=True)


@pytest.mark.slow
def test_a_sharded_optimizer_changes_nothing_in_16_bits():
    """Matrices are cast before they are gathered, not where they are used."""
    groups, sizes = VARIANTS["bfloat16"][0], (4, 1, 1, 1, 2)
    _, weights, told = run(sizes, groups)
    _, sharded, told_of_sharded = run(sizes, {**groups, "mesh": {"shard_optimizer": True}})
    np.testing.assert_allclose(told_of_sharded, told, rtol=1e-6)
    for name, array in sharded.items():
        np.testing.assert_allclose(array, weights[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("sizes", params_of(ALL))
def test_losses_are_those_of_one_device(sizes):
    check(sizes, "plain")
