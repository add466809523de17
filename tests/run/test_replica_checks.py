"""Checksums of replicas: one altered buffer, on any mesh, is found and its device is named."""

import dataclasses

import jax
import numpy as np
import pytest

from gpt3jax import errors, step, train
from gpt3jax.checkpoint import storage
from gpt3jax.model import gpt
from gpt3jax.run import replica_checks
from gpt3jax.sharding import layouts

import tiny


def random_params(mesh, shard_optimizer=False):
    """Return (abstract, random) parameters in the layout of a mesh; nothing is compiled."""
    cfg = tiny.make_config(model={"d_model": 32})
    abstract = jax.eval_shape(lambda: gpt.GPT(cfg.model, jax.random.key(0), 1))
    shardings = layouts.state_shardings(abstract, mesh, over_data=shard_optimizer)
    rng = np.random.default_rng(2)
    arrays = jax.tree.map(
        lambda a, s: jax.device_put(rng.normal(size=a.shape).astype(np.float32), s),
        abstract,
        shardings,
    )
    shapes = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )
    return shapes, arrays


def alter(array, place, mesh):
    """Flip the lowest bit of one value of the shard on the device at this place of the mesh."""
    device = mesh.devices.flat[place]
    buffers = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.reshape(-1).view(np.uint32)[-1] ^= 1
        buffers.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, buffers)


def altered(params, name, place, mesh):
    names = layouts.array_names(params)
    leaves, tree = jax.tree.flatten(params)
    i = names.index(name)
    leaves[i] = alter(leaves[i], place, mesh)
    return jax.tree.unflatten(tree, leaves)


@pytest.mark.parametrize(
    ("axes", "name", "place", "n_replicas"),
    [
        ({"data": 8}, "blocks/mlp/w_in_DF", 5, 8),
        ({"data": 2, "stage": 2, "tensor": 2}, "blocks/mlp/w_in_DF", 6, 2),
        ({"data": 2, "stage": 2, "fsdp": 2}, "norm/scale_D", 3, 8),
        ({"data": 2, "fsdp": 2, "context": 2}, "embedding_VD", 7, 4),
    ],
)
def test_one_flipped_bit_names_the_device(axes, name, place, n_replicas):
    mesh = tiny.make_mesh(**axes)
    shapes, params = random_params(mesh)
    check = replica_checks.Replicas(mesh, shapes, 3)
    check.check(1, params)
    bad = altered(params, name, place, mesh)
    check.after_step(2, bad)  # not due
    with pytest.raises(errors.TransientError, match=r"after step 3 .* equal at step 1") as error:
        check.after_step(3, bad)
    told = str(error.value)
    assert f"{name} ({n_replicas} replicas)" in told
    devices = list(mesh.devices.flat)
    blamed = [i for i, device in enumerate(devices) if told.count(f"device {device}")]
    if n_replicas > 2:
        assert blamed == [place] and "differs from the majority" in told
    else:
        assert len(blamed) == 2 and place in blamed and "without a majority" in told


def test_equal_replicas_are_found_equal_at_each_interval_and_save():
    mesh = tiny.make_mesh(data=4, tensor=2)
    shapes, params = random_params(mesh)
    check = replica_checks.Replicas(mesh, shapes, 2)
    for number in range(1, 6):
        check.after_step(number, params)
    check.check(5, params)
    assert check.last_good == 5
    assert check.describe()[0].startswith("replicas of 16 of 16 parameter arrays")


@pytest.mark.parametrize(
    ("axes", "shard_optimizer", "told"),
    [
        ({"data": 1, "fsdp": 8}, False, "replicas of 10 of 16"),  # small vectors
        ({"data": 8}, True, "no parameter has a replica"),
    ],
)
def test_what_has_no_replicas_is_said(axes, shard_optimizer, told):
    mesh = tiny.make_mesh(**axes)
    shapes, _ = random_params(mesh, shard_optimizer)
    (line,) = replica_checks.Replicas(mesh, shapes, 2).describe()
    assert told in line
    assert replica_checks.Replicas(mesh, shapes, 0).describe() == []


@pytest.mark.slow
def test_a_corrupted_replica_ends_a_run_before_it_is_saved(tmp_path, monkeypatch):
    """At step 5; found before the save after step 6, with no comparison due since step 4."""
    prefix = tiny.write_corpus(tmp_path / "corpus", 7, 300)
    cfg = tiny.make_config(
        data={"paths": (prefix,), "split": "90,5,5"},
        mesh={"data": 8},
        model={"n_layers": 2, "d_model": 32},
        optimizer={"peak_lr": 1e-4, "warmup_samples": 0},
        batch={"global_batch_size": 8},
        train={"n_steps": 9, "eval_interval": 0, "checksum_interval": 4},
        checkpoint={"dir": str(tmp_path / "checkpoints"), "save_interval": 3},
        log={"dir": str(tmp_path / "logs"), "interval": 1},
    )
    build = step.build

    def with_a_broken_device(*args):
        program = build(*args)

        def broken(state, batch):
            state, metrics = program.train(state, batch)
            if int(state.step) == 5:
                params = altered(state.params, "blocks/mlp/w_in_DF", 3, program.mesh)
                state = dataclasses.replace(state, params=params)
            return state, metrics

        return tiny.with_train(program, broken)

    with monkeypatch.context() as patched:
        patched.setattr(step, "build", with_a_broken_device)
        with pytest.raises(
            errors.TransientError, match=r"after step 6 .* equal at step 4"
        ) as error:
            train.train(cfg)
    device = jax.devices()[3]
    assert "blocks/mlp/w_in_DF (8 replicas): differs from the majority: process 0 on host" in str(
        error.value
    )
    assert str(error.value).count(f"device {device}") >= 1
    assert storage.Checkpoints(cfg.checkpoint.dir).steps() == [3]
    assert train.train(cfg)  # as a job script would: from step 3 to the end
