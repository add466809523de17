"""Rows of a table and their gradient, on meshes: not left to XLA's partitioner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gpt3jax.model import embedding_lookup
from gpt3jax.sharding import rules

import tiny

V, D, B, T = 24, 8, 8, 32  # many more ids than rows

MESHES = {  # axes, and whether the step is manual over `data` there
    "data2-fsdp2-tensor2": ({"data": 2, "fsdp": 2, "tensor": 2}, True),
    "data2-context2-tensor2": ({"data": 2, "context": 2, "tensor": 2}, True),
    "fsdp2-context2-tensor2": ({"data": 1, "fsdp": 2, "context": 2, "tensor": 2}, False),
    "data2-fsdp2-tensor2-automatic": ({"data": 2, "fsdp": 2, "tensor": 2}, False),
}


def expected(table, ids, weights):
    """The rows, and the gradient of their sum by weights: each place adds to its id's row."""
    gradient = np.zeros_like(table)
    np.add.at(gradient, ids, weights)
    return table[ids], gradient


def looked_up(axes, manual, kinds, table, ids, weights):
    """Return both from the mesh, in a region that is manual over `data`, or automatic."""
    table_axes, out_axes = kinds

    def weighted(table, ids, weights):
        rows = embedding_lookup.rows(table_axes, out_axes, table, ids)
        rows = rules.constrain(rows, *out_axes, None)
        return (rows * weights).sum(), rows

    def local(table, ids, weights):
        (_, rows), gradient = jax.value_and_grad(weighted, has_aux=True)(table, ids, weights)
        return rows, jax.lax.psum(gradient, "data") if manual else gradient

    mesh = tiny.make_mesh(**axes)
    with jax.set_mesh(mesh):
        if manual:
            by_rows = PartitionSpec("data")
            local = jax.shard_map(
                local,
                in_specs=(PartitionSpec(), by_rows, by_rows),
                out_specs=(by_rows, PartitionSpec()),
                axis_names={"data"},
                check_vma=False,
            )
        table = jax.device_put(table, NamedSharding(mesh, rules.spec(table_axes)))
        return jax.jit(local)(table, ids, weights)


@pytest.mark.parametrize("positions", ["seq", "seq_shard"])
@pytest.mark.parametrize("rows", ["vocab", None])
@pytest.mark.parametrize("mesh", MESHES)
def test_rows_and_their_gradient_are_numpys(mesh, rows, positions):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(V, D)).astype(np.float32)
    ids = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = rng.normal(size=(B, T, D)).astype(np.float32)
    kinds = (rows, "embed"), ("batch", positions)
    results = looked_up(*MESHES[mesh], kinds, table, ids, weights)
    for array, right in zip(results, expected(table, ids, weights), strict=True):
        np.testing.assert_allclose(array, right, atol=1e-5)


def test_without_a_mesh_it_is_plain_indexing():
    table = np.random.default_rng(1).normal(size=(V, D)).astype(np.float32)
    ids = np.arange(V)[None, ::-1]
    weights = jnp.ones((1, V, D))
    rows, gradient = jax.value_and_grad(
        lambda t: (
            embedding_lookup.rows(("vocab", "embed"), ("batch", "seq"), t, ids) * weights
        ).sum()
    )(table)
    np.testing.assert_allclose(rows, table.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.ones((V, D)))
