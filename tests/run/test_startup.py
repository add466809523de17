"""What a start checks once the length of the run is known."""

import pytest

from gpt3jax import errors
from gpt3jax.config import batch_schedule, schema
from gpt3jax.run import startup, step_log
from gpt3jax.sharding import meshes

import tiny


def prepare(wsd_decay_samples=100, start=(0, 0), **groups):
    """Prepare a run from a position, without corpus and checkpoints; its warm-up takes 64."""
    cfg = tiny.make_config(
        mesh={"data": 8}, data={"paths": (), "mock": True},
        optimizer={"decay": "wsd", "wsd_decay_samples": wsd_decay_samples}, **groups,
    )  # fmt: skip
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    mesh = meshes.make_mesh(cfg.mesh)
    return startup.prepare(cfg, mesh, schedule, None, step_log.Position(*start))


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
    assert startup.warmup_warnings(o, 80) == []
    (line,) = startup.warmup_warnings(o, 40)
    assert line.startswith("WARNING: the warm-up of 80 samples is longer than the run of 40: ")
    assert line.endswith("only rises, to 0.0005 where optimizer.peak_lr is 0.001")
