"""Batch sizes against Megatron's own calculators, case by case."""

import json
import pathlib

import pytest

from gpt3jax import batch_schedule, config

GOLDEN = pathlib.Path(__file__).parent / "golden" / "megatron_curve" / "schedules.json"
CASES = json.loads(GOLDEN.read_text())
STEPS = CASES["step_batch_size_schedule"]


def walk(schedule, n_steps, unit):
    """Return [step, samples before, size, microbatches] at each change of size, step by step."""
    runs, consumed = [], 0
    for step in range(n_steps):
        size = schedule.size(consumed)
        if not runs or runs[-1][2] != size:
            runs.append([step, consumed, size, size // unit])
        consumed += size
    return runs, consumed


def assert_same_runs(schedule, case):
    unit = case["micro_batch_size"] * case["data_parallel_size"]
    runs, consumed = walk(schedule, case["steps"], unit)
    assert runs == case["runs"] and consumed == case["consumed_samples"]
    # The same by arithmetic.
    stretches = schedule.stretches(0, consumed)
    assert [[s.first_step, s.first_sample, s.size] for s in stretches] == [r[:3] for r in runs]
    assert schedule.n_steps(consumed) == case["steps"]
    assert schedule.consumed_after(case["steps"]) == consumed


@pytest.mark.parametrize("case", STEPS, ids=lambda c: f"{c['schedule']}/{c['seq_length']}")
def test_step_schedules_are_megatrons(case):
    seq_len = case["seq_length"] or 1
    if "error" in case or case["schedule"] == "0:8 10:4":
        # Megatron refuses them, the shrinking one only in its training loop.
        with pytest.raises(config.UserError, match=r"batch.schedule=.*write it like"):
            batch_schedule.parse(case["schedule"], seq_len)
        return
    stages = batch_schedule.parse(case["schedule"], seq_len)
    assert [list(s) for s in stages] == case["parsed_samples"]
    batch = config.Batch(global_batch_size=stages[-1][1], schedule=case["schedule"])
    schedule = batch_schedule.from_config(batch, seq_len)
    ranks = case["micro_batch_size"], case["data_parallel_size"]
    if "stops_with" in case:
        with pytest.raises(config.UserError, match="is not divisible by batch.microbatch_size"):
            batch_schedule.check(schedule, *ranks)
        return
    batch_schedule.check(schedule, *ranks)
    assert_same_runs(schedule, case)


@pytest.mark.parametrize("case", CASES["linear_ramp"], ids=lambda c: str(c["start"]))
def test_linear_ramps_are_megatrons(case):
    ramp = (case["start"], case["increment"], case["ramp_samples"])
    batch = config.Batch(global_batch_size=case["global_batch_size"], ramp=ramp)
    assert_same_runs(batch_schedule.from_config(batch, 1), case)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"schedule": "0:4 100:8", "global_batch_size": 16}, "below batch.global_batch_size=16"),
        ({"ramp": (4, 5, 100), "global_batch_size": 16}, "use a divisor of 12"),
        ({"ramp": (4, 5), "global_batch_size": 16}, "three positive numbers"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(batch, told):
    with pytest.raises(config.UserError, match=told):
        batch_schedule.from_config(config.Batch(**batch), 1)


def test_global_batch_size_caps_a_schedule():
    batch = config.Batch(global_batch_size=8, schedule="0:4 100:16 200:32")
    assert batch_schedule.from_config(batch, 1).stages == ((0, 4), (100, 8))
    batch = config.Batch(global_batch_size=2, schedule="0:4 100:16")
    assert batch_schedule.from_config(batch, 1).stages == ((0, 2),)
    batch = config.Batch(global_batch_size=2, ramp=(4, 4, 100))
    assert batch_schedule.from_config(batch, 1).stages == ((0, 2),)


def test_a_run_ends_at_its_first_limit_with_whole_batches():
    schedule = batch_schedule.BatchSchedule(((0, 4), (10, 8)))  # 4, 4, 4, 8, 8, ...
    assert [schedule.consumed_after(n) for n in range(6)] == [0, 4, 8, 12, 20, 28]
    ends = {
        (3, 0, 0): 12, (0, 13, 0): 20, (0, 12, 0): 12, (0, 0, 130): 20, (0, 0, 121): 20,
        (4, 12, 0): 12, (3, 100, 1000): 12,
    }  # fmt: skip
    for (n_steps, n_samples, n_tokens), end in ends.items():
        train = config.Train(n_steps=n_steps, n_samples=n_samples, n_tokens=n_tokens)
        assert schedule.end_samples(train, 10) == end, train


def test_resuming_anywhere_takes_the_same_batches():
    schedule = batch_schedule.BatchSchedule(((0, 4), (10, 8), (50, 16)))
    whole = sizes(schedule, 0, 200)
    consumed = 0
    for i, size in enumerate(whole):
        assert sizes(schedule, consumed, 200) == whole[i:]
        consumed += size


def sizes(schedule, start, end):
    return [s.size for s in schedule.stretches(start, end) for _ in range(s.n_steps)]
