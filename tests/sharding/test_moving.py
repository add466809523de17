"""A train state goes to any other layout bit for bit, and no device ever holds a whole array."""

import contextlib
import itertools
import math
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt3jax import errors, step
from gpt3jax.config import ranges
from gpt3jax.sharding import meshes, moving

import corpus
import tiny

AXES = meshes.AXES[1:]  # without copies
# Sizes of the axes, virtual stages, whether the optimizer is sharded.
STAGES = ((2, 2, 1, 1, 2), 1, False)
VIRTUAL_STAGES = ((1, 4, 1, 1, 2), 2, False)  # 2 of them and 3 of them do not nest
OTHER_VIRTUAL_STAGES = ((2, 2, 1, 2, 1), 3, True)
FSDP_TENSOR = ((1, 1, 4, 1, 2), 1, False)
ZERO_1 = ((8, 1, 1, 1, 1), 1, True)


def abstract_state(sizes, virtual_stages, shard_optimizer):
    axes = dict(zip(AXES, sizes, strict=True))
    layout = {**axes, "virtual_stages": virtual_stages, "shard_optimizer": shard_optimizer}
    cfg = tiny.make_config(model={"n_layers": 24}, mesh=layout)
    return step.build(cfg, tiny.make_mesh(**axes), 320).abstract_state


def possible_states():
    """Return the abstract state of every layout of the model on 8 devices, by its name."""
    sizes = [s for s in itertools.product(ranges.divisors_of(8), repeat=5) if math.prod(s) == 8]
    states = {}
    for layout in itertools.product(sizes, (1, 2, 3), (False, True)):
        try:
            states[layout] = abstract_state(*layout)
        except errors.UserError:  # the model does not fit
            continue
    return states


def random_bits(like, seed):
    """Return an array of random bits: infinities, NaNs and denormal numbers are among them."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, like.shape, np.uint32).view(like.dtype)
    return jax.device_put(bits, like.sharding)


def random_state(abstract):
    seeds = itertools.count()
    return jax.tree.map(lambda like: random_bits(like, next(seeds)), abstract)


def bits_of(state):
    return [np.asarray(leaf).view(np.uint32) for leaf in jax.tree.leaves(state)]


def move_and_check(state, like, bits):
    """Move a state; compare bits, shapes and shardings, and see that the source is gone."""
    old = jax.tree.leaves(state)
    moved = moving.move(state, like)
    assert jax.tree.structure(moved) == jax.tree.structure(like)
    rows = zip(old, jax.tree.leaves(moved), jax.tree.leaves(like), bits, strict=True)
    for before, after, wanted, expected in rows:
        assert (after.shape, after.sharding) == (wanted.shape, wanted.sharding)
        np.testing.assert_array_equal(np.asarray(after).view(np.uint32).ravel(), expected.ravel())
        stays = before.shape == after.shape and before.sharding.is_equivalent_to(
            after.sharding, after.ndim
        )
        assert before.is_deleted() != stays
    return moved


def test_a_state_goes_round_a_ring_of_layouts_bit_for_bit():
    state = random_state(abstract_state(*STAGES))
    bits = bits_of(state)
    for layout in (FSDP_TENSOR, VIRTUAL_STAGES, OTHER_VIRTUAL_STAGES, ZERO_1, STAGES):
        state = move_and_check(state, abstract_state(*layout), bits)


@pytest.mark.slower
def test_a_state_goes_through_every_layout_bit_for_bit():
    states = list(possible_states().values())
    assert len(states) > 100
    np.random.default_rng(0).shuffle(states)
    state = random_state(states[0])
    bits = bits_of(state)
    for like in states[1:]:
        state = move_and_check(state, like, bits)


def layouts_of_six(rank):
    """Return meshes of 6 devices with each way to cut an array of this rank by two axes."""
    axis_types = (AxisType.Auto,) * 2
    for sizes in ((2, 3), (3, 2), (6, 1)):
        mesh = Mesh(np.array(jax.devices()[:6]).reshape(sizes), ("a", "b"), axis_types=axis_types)
        for places in itertools.product([None, *range(rank)], repeat=2):
            for order in (("a", "b"), ("b", "a")):
                cut = [tuple(x for x in order if places["ab".index(x)] == i) for i in range(rank)]
                yield NamedSharding(mesh, P(*cut))


@pytest.mark.parametrize("shape", [(12, 18), (4, 9), (2, 15, 1)])
def test_an_array_is_moved_between_any_cuts_of_six_devices(shape):
    """Also where axes of 2 and 3 do not nest, and where 6 does not divide a dimension."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 99, shape, np.int32)
    pairs = list(itertools.product(possible_cuts(shape), repeat=2))
    for source, target in [pairs[i] for i in rng.choice(len(pairs), 12, replace=False)]:
        array = jax.device_put(values, source)
        like = jax.ShapeDtypeStruct(shape, np.int32, sharding=target)
        moved = moving.move_array(array, like)
        assert moved.sharding == target
        for shard in moved.addressable_shards:
            np.testing.assert_array_equal(shard.data, values[shard.index])


def possible_cuts(shape):
    for sharding in layouts_of_six(len(shape)):
        with contextlib.suppress(ValueError):
            sharding.shard_shape(shape)
            yield sharding


@pytest.mark.parametrize("target", [FSDP_TENSOR, OTHER_VIRTUAL_STAGES, ZERO_1])
@pytest.mark.parametrize("source", [STAGES, VIRTUAL_STAGES])
def test_a_device_holds_little_more_than_its_parts(source, target):
    """Both parts, and buffers of their size: XLA alone would gather matrices, 8 such parts."""
    source, target = abstract_state(*source), abstract_state(*target)
    for program in set(moving.programs(source, target)):
        memory = program.compile().memory_analysis()
        parts = memory.argument_size_in_bytes + memory.output_size_in_bytes
        assert memory.temp_size_in_bytes <= 1.5 * parts + 1024, program.argument


def test_a_layout_that_stays_is_not_copied():
    sharding = NamedSharding(tiny.make_mesh(data=2, fsdp=4), P("fsdp"))
    equal = NamedSharding(tiny.make_mesh(stage=2, fsdp=4, data=1), P("fsdp"))
    array = jax.device_put(jnp.arange(8.0), sharding)
    like = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=equal)
    moved = moving.move_array(array, like)
    assert moved.sharding == equal and list(moving.programs(array, like)) == []
    for before, after in zip(array.addressable_shards, moved.addressable_shards, strict=True):
        assert before.data.unsafe_buffer_pointer() == after.data.unsafe_buffer_pointer()


def test_meshes_of_other_devices_are_refused():
    backwards = Mesh(np.array(jax.devices()[::-1]), "a")
    array = jax.device_put(jnp.arange(8.0), NamedSharding(tiny.make_mesh(data=8), P("data")))
    like = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(backwards, P("a")))
    with pytest.raises(AssertionError, match="the same devices in the same order"):
        moving.move_array(array, like)


TWO_PROCESSES = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from gpt3jax import config
from gpt3jax.distributed import joining, messages
from gpt3jax.sharding import meshes, moving
joining.start(config.Distributed(
    n_processes=2, process_id=int(sys.argv[1]), coordinator_address=sys.argv[2], start_timeout=60
), config.Mesh(cpu_devices=4))
stages = NamedSharding(meshes.make_mesh(config.Mesh(stage=8)), PartitionSpec("stage"))
mesh = meshes.make_mesh(config.Mesh(fsdp=4, tensor=2))
fsdp = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
values = np.arange(8 * 12).reshape(8, 12)
array = jax.make_array_from_callback(values.shape, stages, lambda index: values[index])
for target in (fsdp, stages):
    like = jax.ShapeDtypeStruct(values.shape, array.dtype, sharding=target)
    array = moving.move_array(array, like)
    assert array.sharding == target and len(array.addressable_shards) == 4
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])
print("equal")
messages.meet("end", 30)
messages.leave()
"""


@pytest.mark.slow
def test_two_processes_move_an_array_between_them():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(i), address],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(corpus.REPOSITORY)},
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(out.endswith("\nequal\n") for out, _ in outputs), outputs
