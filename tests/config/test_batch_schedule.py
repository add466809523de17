"""Against Megatron's own calculators (golden), and against stepping through a run one by one."""

import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3jax import errors
from gpt3jax.config import batch_schedule, schema

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden/megatron_curve/schedules.json").read_text()
)
STEP_CASES = GOLDEN["step_batch_size_schedule"]
EXAMPLE = STEP_CASES[0]["schedule"]


def step_batch(case):
    """Return our config of a golden case: Megatron has no cap, so it is the last batch here."""
    sizes = [size for _, size in case["parsed_samples"]]
    return schema.Batch(
        global_batch_size=sizes[-1],
        microbatch_size=case["micro_batch_size"],
        schedule=case["schedule"],
    )


def ramp_batch(case):
    return schema.Batch(
        global_batch_size=case["global_batch_size"],
        microbatch_size=case["micro_batch_size"],
        ramp=(case["start"], case["increment"], case["ramp_samples"]),
    )


def seq_len(case):
    return case.get("seq_length") or 1  # null: thresholds are samples


def shrinks(case):
    sizes = [size for _, size in case.get("parsed_samples", [])]
    return sizes != sorted(sizes)


GOOD_CASES = [(step_batch(c), c) for c in STEP_CASES if "error" not in c and not shrinks(c)] + [
    (ramp_batch(c), c) for c in GOLDEN["linear_ramp"]
]


def test_no_golden_case_is_left_out():
    refused, shrinking = (
        [c for c in STEP_CASES if "error" in c],
        [c for c in STEP_CASES if shrinks(c)],
    )
    assert (len(GOOD_CASES), len(refused), len(shrinking)) == (8 + 3, 6, 1)
    assert len(STEP_CASES) == 15 and len(GOLDEN["linear_ramp"]) == 3


@pytest.mark.parametrize(("batch", "case"), GOOD_CASES)
def test_runs_and_steps_are_megatrons(batch, case):
    schedule = batch_schedule.from_config(batch, seq_len(case))
    if "parsed_samples" in case:
        assert [list(stage) for stage in schedule.stages] == case["parsed_samples"]
    n_steps, consumed = case["steps"], case["consumed_samples"]
    ranks = case["data_parallel_size"]
    runs = [
        [run.first_step, run.first_sample, run.size, run.size // batch.microbatch_size // ranks]
        for run in schedule.runs(0, consumed)
    ]
    assert runs == case["runs"]
    assert schedule.consumed_after(n_steps) == consumed
    assert schedule.n_steps(consumed) == n_steps
    for first_step, first_sample, size, _ in case["runs"]:
        assert schedule.size(first_sample) == size
        assert schedule.consumed_after(first_step) == first_sample


@pytest.mark.parametrize(("batch", "case"), GOOD_CASES)
def test_a_stop_of_megatrons_in_mid_run_is_found_before_the_start(batch, case):
    schedule = batch_schedule.from_config(batch, seq_len(case))
    stop = case.get("stops_with")
    if stop is None:
        batch_schedule.check(schedule, batch.microbatch_size, case["data_parallel_size"])
        return
    size = schedule.size(stop["consumed_samples"])
    assert f"current global batch size ({size})" in stop["message"]
    stage = f"batch of {size} from sample {stop['consumed_samples']} on"
    with pytest.raises(errors.UserError, match=stage):
        batch_schedule.check(schedule, batch.microbatch_size, case["data_parallel_size"])


# The schedules that Megatron refuses, and our words.
REFUSED = {
    "5:4 100:8": "the first stage starts at sample 5: start with a threshold of 0",
    "0:4 1:8": "two stages start at sample 0 (of 10 tokens): move their thresholds apart",
    "0:4 100": 'entry "100" must be TOKENS:SIZE, as in 2.4B:320',
    "0:4 x:8": 'entry "x:8" must be TOKENS:SIZE, as in 2.4B:320',
    "": "no entry: give one",
    "0:0 10:4": "the batch size from sample 0 on is 0: give at least 1",
}


@pytest.mark.parametrize("case", [c for c in STEP_CASES if "error" in c])
def test_what_megatron_refuses_is_a_user_error(case):
    with pytest.raises(errors.UserError) as error:
        batch_schedule.parse_schedule(case["schedule"], seq_len(case))
    assert REFUSED[case["schedule"]] in str(error.value)
    assert f'batch.schedule="{case["schedule"]}"' in str(error.value)


@pytest.mark.parametrize("case", [c for c in STEP_CASES if shrinks(c)])
def test_a_batch_that_shrinks_is_a_user_error(case):
    # Stricter than the golden case: Megatron's calculator takes it, but its training loop stops
    # where the number of microbatches falls.
    with pytest.raises(errors.UserError, match="shrinks from 8 to 4 at sample 10: let sizes grow"):
        batch_schedule.parse_schedule(case["schedule"], seq_len(case))


@pytest.mark.parametrize("text", ["0:nan", "0:inf", "0:-4", "-5:4", ":4", "0:4x", "0:1:2", ", ,"])
def test_an_unreadable_schedule_is_a_user_error(text):
    with pytest.raises(errors.UserError, match=r"batch\.schedule=.*: "):
        batch_schedule.from_config(schema.Batch(global_batch_size=4, schedule=text), 1)


def test_an_entry_may_have_suffixes_in_either_case_on_both_sides():
    assert batch_schedule.parse_schedule("0:0.5k 2.5m:2K 1T:3K", 10) == (
        (0, 500),
        (250_000, 2000),
        (10**11, 3000),
    )


def test_an_empty_schedule_is_a_constant_batch():
    schedule = batch_schedule.from_config(schema.Batch(global_batch_size=24), 2048)
    assert schedule.stages == ((0, 24),)
    assert schedule.runs(48, 100) == ((0, 48, 24, 3),)


def test_global_batch_size_caps_the_schedule():
    capped = schema.Batch(global_batch_size=400, schedule=EXAMPLE)
    schedule = batch_schedule.from_config(capped, 2048)
    assert schedule.stages == ((0, 16), (1_171_875, 320), (2_343_750, 400))


def test_a_schedule_that_ends_below_global_batch_size_names_both():
    batch = schema.Batch(global_batch_size=2048, schedule=EXAMPLE)
    with pytest.raises(
        errors.UserError, match=r"ends at 1536, below batch\.global_batch_size=2048"
    ):
        batch_schedule.from_config(batch, 2048)


@pytest.mark.parametrize(
    ("ramp", "told"),
    [
        ((16, 16), "batch.ramp=16 16 must be three positive numbers"),
        ((16, 16, 0), "batch.ramp=16 16 0 must be three positive numbers"),
        ((0, 16, 100), "batch.ramp=0 16 100 must be three positive numbers"),
        ((64, 16, 100), "starts at 64, not below batch.global_batch_size=64: start lower"),
        (
            (16, 10, 100),
            "increment 10 does not divide batch.global_batch_size=64 less the start, 48",
        ),
        ((16, 10, 100), "use one of 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
    ],
)
def test_a_ramp_that_cannot_be_is_a_user_error(ramp, told):
    with pytest.raises(errors.UserError) as error:
        batch_schedule.from_config(schema.Batch(global_batch_size=64, ramp=ramp), 1)
    assert told in str(error.value)


@settings(deadline=None)  # shared machines are slow
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 300))
def test_the_ramp_is_megatrons_formula_at_every_sample(start, increment, n_increments, n_samples):
    full = start + n_increments * increment
    stages = batch_schedule.ramp_stages((start, increment, n_samples), full)
    schedule = batch_schedule.BatchSchedule(stages)
    for consumed in range(n_samples + 3):
        expected = full
        if consumed <= n_samples:
            samples_per_increment = n_samples / ((full - start) / increment)
            expected = start + increment * int(consumed / samples_per_increment)
        assert schedule.size(consumed) == expected


@st.composite
def schedules(draw):
    firsts = [0, *draw(st.lists(st.integers(1, 60), unique=True, max_size=5).map(sorted))]
    n = len(firsts)
    sizes = draw(st.lists(st.integers(1, 30), unique=True, min_size=n, max_size=n).map(sorted))
    return batch_schedule.BatchSchedule(tuple(zip(firsts, sizes, strict=True)))


@settings(deadline=None)
@given(schedules(), st.integers(0, 80), st.integers(0, 150))
def test_arithmetic_equals_stepping_one_by_one(schedule, start, length):
    end, sample, walked = start + length, start, []
    while sample < end:
        assert schedule.consumed_after(len(walked), start) == sample
        walked.append((sample, schedule.size(sample)))
        sample += schedule.size(sample)
    assert schedule.n_steps(end, start) == len(walked)
    assert schedule.consumed_after(len(walked), start) == sample
    runs = schedule.runs(start, end)
    steps = [
        (run.first_sample + i * run.size, run.size) for run in runs for i in range(run.n_steps)
    ]
    assert steps == walked
    assert [run.first_step for run in runs] == [
        sum(earlier.n_steps for earlier in runs[:i]) for i in range(len(runs))
    ]
    assert len({run.size for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("limits", "end"),
    [
        ({"n_steps": 3}, 4 + 4 + 4),
        ({"n_steps": 6}, 4 + 4 + 4 + 6 + 6 + 6),
        ({"n_samples": 12}, 12),
        ({"n_samples": 13}, 12 + 6),  # the last batch starts before the limit
        ({"n_tokens": 120}, 12),
        ({"n_tokens": 121}, 12 + 6),
        ({"n_steps": 3, "n_samples": 13, "n_tokens": 999}, 12),
        ({"n_steps": 9, "n_samples": 11, "n_tokens": 999}, 12),
        ({"n_steps": 9, "n_samples": 99, "n_tokens": 1}, 4),
    ],
)
def test_a_run_ends_at_its_first_limit_with_a_whole_batch(limits, end):
    batch = schema.Batch(global_batch_size=6, schedule="0:4 100:6")
    schedule = batch_schedule.from_config(batch, 10)
    assert schedule.end(schema.Train(**limits), 10) == (schedule.n_steps(end), end)


@pytest.mark.parametrize(
    ("limits", "end"),
    [
        ({"n_steps": 5}, (5, 7 + 6 + 6)),
        ({"n_samples": 20}, (6, 7 + 6 + 6 + 6)),
        ({"n_samples": 7}, (3, 7)),
        ({"n_steps": 2}, (3, 7)),  # passed already
    ],
)
def test_a_run_may_go_on_from_where_another_batch_size_left_it(limits, end):
    schedule = batch_schedule.from_config(schema.Batch(global_batch_size=6), 10)
    assert schedule.end(schema.Train(**limits), 10, start_step=3, start=7) == end


def test_a_constant_batch_that_does_not_divide_names_field_numbers_and_fix():
    schedule = batch_schedule.from_config(schema.Batch(global_batch_size=100), 1)
    with pytest.raises(errors.UserError) as error:
        batch_schedule.check(schedule, 2, 8)
    for told in ("batch.global_batch_size=100", "batch.microbatch_size=2", "8 data-parallel", "16"):
        assert told in str(error.value)
    batch_schedule.check(schedule, 5, 4)
