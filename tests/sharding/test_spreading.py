"""Layouts in which replicas have shares of an array: nothing twice, and the same array again."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt3jax.sharding import meshes, spreading

import tiny

MESH = {"data": 2, "stage": 2, "tensor": 2}
LAYOUTS = [
    pytest.param((8, 6, 4), P(), 1, id="replicated"),
    pytest.param((8, 6, 4), P("stage", None, "tensor"), 1, id="layers are shared"),
    pytest.param((3, 10, 4), P(None, "tensor"), 1, id="the first that divides"),
    pytest.param((2, 6, 3), P("stage"), 2, id="one axis divides nothing"),
    pytest.param((12, 2), P(("tensor", "stage")), 1, id="two axes cut one"),
    pytest.param((3, 5), P(), 8, id="none divides"),
    pytest.param((4, 2, 2), P("data", "stage", "tensor"), 1, id="nothing is replicated"),
    pytest.param((), P(), 8, id="a number"),
]


def layout(shape, spec):
    mesh = tiny.make_mesh(**MESH)
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))


@pytest.mark.parametrize(("shape", "spec", "n_readers"), LAYOUTS)
def test_each_part_is_with_as_few_devices_as_can_be(shape, spec, n_readers):
    spread = spreading.spread(layout(shape, spec))
    parts = spread.sharding.devices_indices_map(shape).values()
    found = [str(part) for part in parts]
    assert {found.count(part) for part in found} == {n_readers}


@pytest.mark.parametrize(("shape", "spec", "n_readers"), LAYOUTS)
def test_an_array_is_whole_again_on_every_device(shape, spec, n_readers):
    like = layout(shape, spec)
    values = np.random.default_rng().standard_normal(shape).astype(np.float32)
    array = jax.device_put(values, spreading.spread(like).sharding)
    gathered = spreading.gather(array, like)
    assert gathered.sharding == like.sharding
    for shard in gathered.addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])


def test_every_axis_can_share_the_reading():
    for axis, other in itertools.permutations(meshes.AXES, 2):
        mesh = tiny.make_mesh(**{"data": 1, axis: 4, other: 2})
        like = jax.ShapeDtypeStruct(
            (4, 2), np.float32, sharding=NamedSharding(mesh, P(None, other))
        )
        assert spreading.spread(like).sharding.shard_shape((4, 2)) == (1, 1)
