"""Checkpoints: what was saved comes back on any mesh, or is known to be damaged."""

import dataclasses
import functools
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax import errors, step
from gpt3jax.checkpoint import (
    array_blocks,
    array_digests,
    choosing,
    metadata,
    parameters,
    storage,
)
from gpt3jax.config import schema
from gpt3jax.sharding import meshes

import tiny

ORDER = {"corpora": "a corpus", "seed": 1234}
MESHES = {
    "one": {},
    "data8": {"data": 8},
    "fsdp8": {"data": 1, "fsdp": 8},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
    "stages": {"data": 1, "stage": 2, "virtual_stages": 2, "context": 2, "tensor": 2},
    "zero": {"data": 4, "tensor": 2, "shard_optimizer": True},
}


def config_on(mesh):
    return tiny.make_config(mesh=MESHES[mesh])


@functools.cache
def program(mesh):
    axes = {k: v for k, v in MESHES[mesh].items() if k in meshes.AXES}
    return step.build(config_on(mesh), tiny.make_mesh(**axes), 320)


@functools.cache
def trained(mesh):
    """Return a state with moments that are not zero."""
    n_microbatches = 2 if mesh == "stages" else 1
    batch = tiny.make_batch(0, config_on(mesh), program(mesh).mesh, n_microbatches)
    return program(mesh).train(program(mesh).init(), batch)[0]


def meta(step_number, mesh="mixed"):
    return metadata.Meta(
        step=step_number, consumed_samples=16 * step_number, data_order=ORDER,
        config=schema.flatten(config_on(mesh)),
    )  # fmt: skip


def saved(folder, mesh="mixed", steps=(1,), max_to_keep=3):
    store = storage.Checkpoints(str(folder), max_to_keep)
    for n in steps:
        store.save(trained(mesh), meta(n, mesh))
        assert store.poll(wait=True) == ""
    return store


def speed_of(here, there):
    """Return the mark of a pair of meshes: one is tested in CI."""
    return pytest.mark.slow if (here, there) == ("mixed", "zero") else pytest.mark.slower


@pytest.mark.parametrize(
    ("here", "there"),
    [
        pytest.param(here, there, marks=speed_of(here, there))
        for here in MESHES for there in MESHES
    ],
)  # fmt: skip
def test_a_state_comes_back_on_another_mesh(tmp_path, here, there):
    """Parameters and moments, bit for bit; virtual stages stack layers in another shape."""
    store = saved(tmp_path, here)
    abstract = program(there).abstract_state
    state, found = store.restore(1, abstract), store.read_meta(1)
    assert (found.step, found.consumed_samples) == (1, 16)
    expected = tiny.leaves(trained(here))
    for name, array in tiny.leaves(state).items():
        np.testing.assert_array_equal(array, expected[name].reshape(array.shape), err_msg=name)
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == want.sharding and leaf.dtype == want.dtype


@pytest.mark.slower
def test_digests_do_not_depend_on_the_mesh():
    one = np.asarray(array_digests.digests(trained("one")))
    for mesh in MESHES:
        moved = jax.tree.map(
            lambda x, a: jax.device_put(x.reshape(a.shape), a.sharding),
            jax.tree.leaves(trained("one")),
            jax.tree.leaves(program(mesh).abstract_state),
        )
        np.testing.assert_array_equal(array_digests.digests(moved), one)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["mixed", "stages"])
def test_an_array_is_read_in_parts_in_the_order_of_its_layers(tmp_path, mesh, monkeypatch):
    """Of any run: with virtual stages as well, whose layers have two dimensions."""
    monkeypatch.setattr(array_blocks, "BLOCK_BYTES", 2 * 4 * 64 * 3 * 64)
    store, abstract = saved(tmp_path, mesh), program(mesh).abstract_state
    for name in ("params/blocks/attention/w_qkv_D3HK", "params/embedding_VD", "params/norm/bias_D"):
        expected = tiny.leaves(trained(mesh))[name]
        if "/blocks/" in name:
            expected = expected.reshape(4, *expected.shape[-4:])
        parts = list(store.read_blocks(1, abstract, f"{name}/value"))
        assert name.endswith("bias_D") or len(parts) > 1
        np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_a_save_that_takes_too_long_names_the_option(tmp_path):
    """The rows are made once for the digest, and once, slowly, to be written."""
    made = []

    def rows(first, stop):
        made.append(first)
        time.sleep(2.5 if len(made) > 1 else 0)
        return np.zeros((stop - first, 3), np.float32)

    blocks = {"table": array_blocks.Blocks((2, 3), rows)}
    store = storage.Checkpoints(str(tmp_path), save_timeout=1)
    store.save_params(blocks, meta(0))
    failure = store.poll(wait=True)
    assert "not written within checkpoint.save_timeout=1 s: raise that" in failure
    assert not store.steps()


def test_digests_of_parts_add_up(monkeypatch):
    x = np.random.default_rng().standard_normal((10, 3, 7)).astype(np.float32)
    expected = np.asarray(array_digests.digests([x]))[0]
    for n_bytes in (1, 100, 1 << 20):
        monkeypatch.setattr(array_blocks, "BLOCK_BYTES", n_bytes)
        blocks = array_blocks.Blocks(x.shape, lambda first, stop: x[first:stop])
        np.testing.assert_array_equal(array_digests.digest_of_blocks(blocks), expected)


@pytest.mark.parametrize("bit", [0, 13, 31])
def test_a_flipped_bit_or_two_swapped_values_change_a_digest(bit):
    x = jax.random.normal(jax.random.key(0), (6, 50, 7))
    bits = np.asarray(x).view(np.uint32).copy()
    bits[3, 20, 2] ^= np.uint32(1 << bit)
    swapped = np.asarray(x).copy()
    swapped[0, [1, 2]] = swapped[0, [2, 1]]
    for other in (bits.view(np.float32), swapped, np.asarray(x)[::-1], np.asarray(x) + 0.0):
        same = np.array_equal(
            array_digests.digests([x]), array_digests.digests([jnp.asarray(other)])
        )
        assert same == np.array_equal(x, other)


@pytest.mark.slow
def test_only_the_newest_are_kept(tmp_path):
    assert saved(tmp_path, steps=(1, 2, 3, 4), max_to_keep=2).steps() == [4, 3]


def test_some_are_kept_for_good(tmp_path):
    store = storage.Checkpoints(str(tmp_path), max_to_keep=2, keep_period=3)
    state = {"x": jnp.arange(5.0)}
    for n in range(1, 8):
        store.save(state, meta(n))
        assert store.wait() == ""
    assert store.steps() == [7, 6, 3]


def save_one(folder, number, keep_period, max_to_keep=1):
    """Save as a start with these options does."""
    store = storage.Checkpoints(str(folder), max_to_keep, keep_period=keep_period)
    state, saved_meta = {"x": jnp.arange(5.0)}, meta(number)
    saved_meta.config["checkpoint.keep_period"] = keep_period
    store.save(state, saved_meta)
    assert store.wait() == ""
    store.close()
    return store.steps()


def test_what_was_kept_for_good_stays_whatever_a_later_start_says(tmp_path):
    """The option is left out, another period is given, or fewer of the newest are kept."""
    for n in (10, 20, 30):
        save_one(tmp_path, n, keep_period=20)
    assert save_one(tmp_path, 40, keep_period=0, max_to_keep=3) == [40, 30, 20]
    assert save_one(tmp_path, 50, keep_period=0) == [50, 20]
    assert save_one(tmp_path, 60, keep_period=50) == [60, 50, 20], "50 was there when it began"
    assert save_one(tmp_path, 70, keep_period=0) == [70, 50, 20]
    store = storage.Checkpoints(str(tmp_path), read_only=True)
    assert [store.read_meta(n).step for n in store.steps()] == [70, 50, 20]


def test_what_a_run_did_not_write_is_kept_for_good(tmp_path):
    """Parameters alone, which it began from, and what says no more what it is."""
    for n in (1, 2):
        save_one(tmp_path, n, keep_period=0, max_to_keep=5)
    file = tmp_path / "1" / "meta" / "metadata"
    file.write_text(file.read_text().replace('"only_params": false', '"only_params": true'))
    (tmp_path / "2" / "meta" / "metadata").write_text("{")
    assert save_one(tmp_path, 3, keep_period=0) == [3, 2, 1]
    assert save_one(tmp_path, 4, keep_period=0) == [4, 2, 1]


def test_a_checkpoint_that_another_run_wrote_is_reported(tmp_path):
    store, state = storage.Checkpoints(str(tmp_path), max_to_keep=1), {"x": jnp.arange(5.0)}
    for n in (1, 2):
        store.check_alone()
        store.save(state, meta(n))
        assert store.wait() == ""
    store.check_alone()
    (tmp_path / "damaged-7").mkdir()
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    store.check_alone()
    (tmp_path / "5").mkdir()
    with pytest.raises(errors.UserError, match="a checkpoint of step 5, which this run did not"):
        store.check_alone()
    storage.Checkpoints(str(tmp_path)).check_alone()  # the next start knows it


@pytest.mark.slow
def test_saving_overlaps_the_next_steps(tmp_path):
    """The state may be donated as soon as save returns."""
    cfg, mixed = tiny.make_config(), program("mixed")
    state = mixed.train(mixed.init(), tiny.make_batch(0, cfg, mixed.mesh, 1))[0]
    expected = tiny.leaves(state)
    store = storage.Checkpoints(str(tmp_path))
    store.save(state, meta(1))
    mixed.train(state, tiny.make_batch(1, cfg, mixed.mesh, 1))
    assert store.poll(wait=True) == "" and store.poll() is None
    for name, array in tiny.leaves(store.restore(1, mixed.abstract_state)).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_another_model_is_refused_with_the_differences(tmp_path):
    store = saved(tmp_path)
    choosing.check_same_model(config_on("mixed"), store.read_meta(1))
    other = tiny.make_config(model={"n_layers": 2, "gelu": "erf"})
    with pytest.raises(errors.UserError) as error:
        choosing.check_same_model(other, store.read_meta(1))
    assert "model.n_layers: checkpoint 4, here 2" in str(error.value)
    assert "model.gelu: checkpoint tanh, here erf" in str(error.value)


def test_another_order_of_samples_is_refused_unless_allowed(tmp_path):
    meta, cfg = saved(tmp_path).read_meta(1), tiny.make_config()
    choosing.check_same_order(cfg, meta, ORDER)
    changed = ORDER | {"seed": 5}
    with pytest.raises(errors.UserError, match=r"train.seed: checkpoint 1234, here 5"):
        choosing.check_same_order(cfg, meta, changed)
    allowing = dataclasses.replace(cfg.checkpoint, allow_new_data_order=True)
    choosing.check_same_order(dataclasses.replace(cfg, checkpoint=allowing), meta, changed)


def test_changed_meta_data_are_damage(tmp_path):
    store = saved(tmp_path, steps=(1, 2))
    file = tmp_path / "2" / "meta" / "metadata"
    assert '"consumed_samples": 32' in file.read_text()
    file.write_text(file.read_text().replace('"consumed_samples": 32', '"consumed_samples": 33'))
    with pytest.raises(metadata.DamagedError, match="meta file was changed"):
        store.read_meta(2)
    assert store.read_meta(1).consumed_samples == 16


def test_the_band_of_a_dense_model_may_change(tmp_path):
    meta = saved(tmp_path).read_meta(1)
    choosing.check_same_model(tiny.make_config(model={"attention": schema.Attention(band=7)}), meta)
    banded = schema.Attention(pattern="alternating", band=7)
    with pytest.raises(errors.UserError, match=r"model\.attention\.band: checkpoint \d+, here 7"):
        choosing.check_same_model(tiny.make_config(model={"attention": banded}), meta)


def test_an_explicit_load_must_find_something(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(errors.UserError, match="has no checkpoint: correct the folder"):
            choosing.choose_source(None, str(folder))
    assert not (tmp_path / "nothing").exists()


def test_the_runs_own_checkpoint_goes_before_the_one_to_load(tmp_path):
    own, other = saved(tmp_path / "own"), saved(tmp_path / "other")
    assert choosing.choose_source(own, str(other.folder)) is own
    empty = storage.Checkpoints(str(tmp_path / "empty"))
    assert choosing.choose_source(empty, str(other.folder)).folder == other.folder


FEWER = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
import sys
sys.path.insert(0, sys.argv[2])
import tiny
from gpt3jax import step
from gpt3jax.checkpoint import storage
cfg = tiny.make_config()
program = step.build(cfg, tiny.make_mesh(data=1, fsdp=2), 320)
state = storage.Checkpoints(sys.argv[1]).restore(1, program.abstract_state)
print("sum", sum(float(abs(x).sum()) for x in jax.tree.leaves(state.params)))
"""


def test_a_state_comes_back_on_fewer_devices(tmp_path):
    """In a process of its own, where the devices that wrote it do not exist."""
    saved(tmp_path, "mixed")
    command = [sys.executable, "-c", FEWER, str(tmp_path), str(pathlib.Path(__file__).parents[1])]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected = sum(np.abs(x).sum() for x in tiny.leaves(trained("mixed").params).values())
    np.testing.assert_allclose(float(output.split()[-1]), expected, rtol=1e-5)


def test_a_model_trained_in_8_bits_is_used_in_the_format_that_is_asked_for(tmp_path):
    cfg = tiny.make_config(precision={"matmul_dtype": "float8", "end_layers": 1})
    trained_in_8_bits = step.build(cfg, tiny.one_device_mesh(), 320)
    assert trained_in_8_bits.compute.float8
    store = storage.Checkpoints(str(tmp_path))
    written = dataclasses.replace(meta(0), config=schema.flatten(cfg))
    store.save(trained_in_8_bits.init(), written)
    assert store.poll(wait=True) == ""
    used = parameters.open_newest(str(tmp_path), tiny.one_device_mesh(), "bfloat16").program
    assert (used.compute.dtype, used.compute.float8) == ("bfloat16", False)
