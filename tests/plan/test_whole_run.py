"""Rows of batch sizes and their sums, against arithmetic by hand."""

import dataclasses

import pytest

from gpt3jax.config import layout, recipe
from gpt3jax.hardware import gpus
from gpt3jax.plan import ranking, step_choice, step_report, time_model, whole_run

H100 = gpus.GPUS["h100"]
SECONDS = {4: 900.0, 8: 1200.0, 16: 1800.0}


@pytest.fixture
def planner(growing_file):
    """A planner of 20 steps: 8 of 4 sequences, 8 of 8, 4 of 16."""
    args = [f"--config={growing_file}", "--data.mock", "--train.n-steps=20"]
    target = step_report.Target(gpu=H100, network=gpus.network_of(H100), price=3.0)
    return step_choice.Planner(
        cfg=recipe.parse(args), recipe_args=args, target=target, compiles=False,
        say=lambda line: None,
    )  # fmt: skip


@pytest.fixture
def steps(planner):
    """Steps that take `SECONDS`."""
    found = ranking.of_config(planner.cfg, 8, H100, planner.target.network)
    _, chosen = step_choice.choose(planner, found)
    return {size: with_seconds(step, SECONDS[size]) for size, step in chosen.items()}


def with_seconds(step, seconds):
    taken = step_report.StepSeconds(low=seconds, expected=seconds, high=seconds)
    return dataclasses.replace(step, time=dataclasses.replace(step.time, step_seconds=taken))


def test_each_batch_size_has_its_steps_tokens_and_hours(planner, steps):
    rows = whole_run.batches(planner.cfg, steps)
    assert [(row.batch_size, row.steps, row.tokens) for row in rows] == [
        (4, 8, 8 * 4 * 512), (8, 8, 8 * 8 * 512), (16, 4, 4 * 16 * 512),
    ]  # fmt: skip
    assert [row.hours for row in rows] == pytest.approx([2, 8 / 3, 2])
    assert [row.layout for row in rows] == [layout.of(step.cfg) for step in steps.values()]
    assert all(row.fits for row in rows)


def test_the_run_is_the_sum_of_its_batch_sizes(planner, steps):
    run = whole_run.run(whole_run.batches(planner.cfg, steps), 10, 3.0)
    assert (run.run_steps, run.run_tokens) == (20, 160 * 512)
    assert run.run_days == pytest.approx((2 + 8 / 3 + 2) / 24)
    assert run.gpu_hours == pytest.approx(10 * (2 + 8 / 3 + 2))
    assert run.cost == pytest.approx(3 * run.gpu_hours)
    assert run.ramp_hours == pytest.approx(2 + 8 / 3)
    # In full batches, 1,800 s for 16, the first 32 + 64 sequences would take 1 and 2 hours.
    assert run.ramp_extra_hours == pytest.approx(2 + 8 / 3 - 1 - 2)


def test_steps_that_would_be_refused_count_as_full_ones(planner, steps):
    rows = whole_run.batches(planner.cfg, {**steps, 4: "it does not divide"})
    assert rows[0] == whole_run.Batch(batch_size=4, steps=8, tokens=8 * 4 * 512)
    run = whole_run.run(rows, 10, 0.0)
    assert run.run_days == pytest.approx((1 + 8 / 3 + 2) / 24)
    assert run.ramp_extra_hours == pytest.approx(8 / 3 - 2) and run.cost is None


def test_sizes_that_a_run_does_not_reach_have_no_steps(planner, steps):
    train = dataclasses.replace(planner.cfg.train, n_steps=10)
    rows = whole_run.batches(dataclasses.replace(planner.cfg, train=train), steps)
    assert [row.steps for row in rows] == [8, 2, 0]
    assert whole_run.run(rows, 10, 0.0).run_steps == 10


def test_gpus_that_compute_the_same_as_others_are_no_use(planner):
    """MFU and tokens/s a GPU are of all GPUs. Copies are deterministic, to stay equal."""
    precision = dataclasses.replace(planner.cfg.precision, deterministic=True)
    cfg = dataclasses.replace(planner.cfg, precision=precision)
    planner = dataclasses.replace(planner, cfg=cfg)
    plain = layout.plain_fields(planner.cfg) | {"mesh.data": 4}
    alone = planner.step(4, plain)
    copied = planner.step(4, plain | {"mesh.copies": 2})
    assert copied.time.step_seconds.expected == pytest.approx(alone.time.step_seconds.expected)
    assert copied.time.mfu == pytest.approx(alone.time.mfu / 2)
    assert copied.time.tokens_per_second_per_gpu == pytest.approx(
        alone.time.tokens_per_second_per_gpu / 2
    )
    assert copied.work.model_flops_per_step == pytest.approx(alone.work.model_flops_per_step)
    peak = 8 * time_model.peak_flops(planner.cfg, H100) * copied.time.step_seconds.expected
    assert copied.time.mfu == pytest.approx(copied.work.model_flops_per_step / peak)
