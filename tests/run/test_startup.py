"""Where a run starts from, and what it checks once the length of the run is known."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax import errors
from gpt3jax.checkpoint import storage
from gpt3jax.config import schema
from gpt3jax.run import start_report, startup, step_log
from gpt3jax.watch import phases

import tiny


def prepare(wsd_decay_samples=100, start=(0, 0), **groups):
    """Prepare a run from a position, without corpus and checkpoints; its warm-up takes 64."""
    cfg = tiny.make_config(
        mesh={"data": 8}, data={"paths": (), "mock": True},
        optimizer={"decay": "wsd", "wsd_decay_samples": wsd_decay_samples}, **groups,
    )  # fmt: skip
    return tiny.prepared(cfg, start=start)


@pytest.mark.parametrize(
    "groups",
    [
        {"train": {"n_steps": 10}},
        {"train": {"n_steps": 0, "n_samples": 150}},
        {"train": {"n_steps": 0, "n_tokens": 160 * 32}},
        {"train": {"n_steps": 14}, "batch": {"schedule": f"0:8 {64 * 32}:16"}},  # 8 x 8, 6 x 16
    ],
    ids=["steps", "samples", "tokens", "growing"],
)
def test_a_final_decay_that_does_not_fit_in_the_run_is_refused(groups):
    assert prepare(96, **groups).n_samples == 160
    with pytest.raises(errors.UserError, match=r"takes 161 samples, which exceeds the run's 160"):
        prepare(97, **groups)


def test_the_length_is_that_of_the_run_that_goes_on():
    """10 steps of 16 samples were taken, 10 of 8 are to come: 240, and not 20 x 8 in all."""
    small = {"batch": {"global_batch_size": 8}}
    assert prepare(start=(10, 160), **small).n_samples == 240
    with pytest.raises(errors.UserError, match="exceeds the run's 160"):
        prepare(**small)


@pytest.mark.parametrize("warmup", [{"warmup_samples": 80}, {"warmup_fraction": 0.5}])
def test_a_run_that_ends_in_its_warm_up_is_warned_of(warmup):
    """It is a usual trial of a recipe, and the rate never falls: so no more than a warning."""
    o = schema.Optimizer(peak_lr=1e-3, decay_samples=160, **warmup)
    assert start_report.warmup_warnings(o, 80) == []
    (line,) = start_report.warmup_warnings(o, 40)
    assert line.startswith("WARNING: the warm-up of 80 samples is longer than the run of 40: ")
    assert line.endswith("only rises, to 0.0005 where optimizer.peak_lr is 0.001")


def test_a_process_with_several_gpus_says_how_to_start_one_for_each():
    (line,) = start_report.several_gpus("gpu", 8)
    assert "one process has 8 GPUs" in line and "gpt3jax.distributed.launch gpt3jax.main" in line
    assert start_report.several_gpus("gpu", 1) == start_report.several_gpus("cpu", 8) == []


def make_config(**checkpoint):
    return tiny.make_config(
        model={"n_layers": 1, "d_model": 32}, mesh={"data": 8},
        data={"paths": (), "mock": True}, checkpoint=checkpoint,
    )  # fmt: skip


def start(cfg):
    return startup.start_or_resume(cfg, phases.Phases())


def save(folder, *step_numbers):
    """Save a run's first state as those of these steps, and return its arrays."""
    cfg = make_config(dir=str(folder))
    store = storage.Checkpoints(str(folder))
    run = tiny.prepared(cfg, store)
    state = run.program.init()
    for n in step_numbers:
        position = step_log.Position(n, 16 * n)
        store.save(dataclasses.replace(state, step=jnp.int32(n)), startup.meta_of(run, position))
        assert store.wait() == ""
    store.close()
    return tiny.leaves(state.params)


def damage(folder, how):
    """Spoil the largest file of array data of a checkpoint."""
    file = max((folder / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
        return
    if how == "flip":
        data[len(data) // 2] ^= 0x10
    file.write_bytes(data if how == "flip" else data[: len(data) // 2])


def assert_equal_params(state, expected):
    for name, array in tiny.leaves(state.params).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, how):
    expected = save(tmp_path, 1, 2)
    damage(tmp_path / "2", how)
    started = start(make_config(dir=str(tmp_path)))
    assert started.position == (1, 16) and int(started.state.step) == 1
    assert started.run.store.steps() == [1] and (tmp_path / "damaged-2").is_dir()
    warning, resumed = started.lines
    assert warning.startswith(f"WARNING: checkpoint {tmp_path}/2 ")
    assert warning.endswith("; going back to an older one")
    assert resumed == f"resumed from {tmp_path} at step 1, 16 samples"
    assert_equal_params(started.state, expected)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_without_a_whole_checkpoint_nothing_starts_from_scratch(tmp_path):
    save(tmp_path, 1)
    damage(tmp_path / "1", "flip")
    for _ in range(2):  # again, as a restarted job would
        with pytest.raises(errors.UserError, match="no whole checkpoint is left") as error:
            start(make_config(dir=str(tmp_path)))
        assert f"\nWARNING: checkpoint {tmp_path}/1 was changed" in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("only_params", "position"), [(False, (1, 16)), (True, (0, 0))], ids=["whole", "params"]
)
def test_another_runs_folder_is_only_read(tmp_path, only_params, position):
    expected = save(tmp_path, 1, 2)
    damage(tmp_path / "2", "flip")
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # a save under way there
    before = sorted(p.name for p in tmp_path.iterdir())
    started = start(make_config(load=str(tmp_path), only_params=only_params))
    assert started.position == position and "going back to an older one" in started.lines[0]
    assert_equal_params(started.state, expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_start_says_which_products_are_in_8_bits_and_where_they_are_emulated():
    plain, in_8_bits, ends = (
        schema.Precision(matmul_dtype=dtype, end_layers=n)
        for dtype, n in (("compute_dtype", 0), ("float8", 0), ("float8", 2))
    )
    assert start_report.formats(plain, "gpu") == "bfloat16"
    line = "bfloat16, layers' products in float8"
    assert start_report.formats(in_8_bits, "gpu") == f"{line}; MFU is of its peak"
    assert "emulated" in start_report.formats(in_8_bits, "cpu")
    assert start_report.formats(ends, "gpu").startswith(f"{line} but for 2 layers at either end")
