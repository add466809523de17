"""What the checks conclude from the answers: who differs, who is slow, who may try again."""

import random

import numpy as np
import pytest

from gpt3jax import errors
from gpt3jax.preflight import checks


def make_hosts(n):
    return [f"host-{i // 4}" for i in range(n)]


def random_facts(rng, n_keys):
    return {f"key.{k}": f"{rng.random():.6f}" for k in range(n_keys)}


def test_the_processes_that_differ_from_most_are_named_with_each_value():
    rng = random.Random()
    usual = random_facts(rng, 30)
    answers = [dict(usual) for _ in range(16)]
    changed = {i: rng.sample(sorted(usual), 2) for i in rng.sample(range(16), 5)}
    for i, keys in changed.items():
        for key in keys:
            answers[i][key] = f"other {i} {key}"
    found = checks.same("config", make_hosts(16), answers, "fail", "{n} fields")
    assert found.status == "fail" and found.result == "not the same on 5 of 16 processes"
    expected = {
        f"{key}=other {i} {key} on process {i} (host-{i // 4}), {usual[key]} on the others"
        for i, keys in changed.items()
        for key in keys
    }
    assert {line.text for line in found.lines} == expected
    assert {i for line in found.lines for i in line.processes} == set(changed)


def test_equal_processes_pass_and_silent_ones_are_not_compared():
    usual = random_facts(random.Random(), 7)
    found = checks.same("config", make_hosts(5), [usual, None, usual, usual, None], "fail", "{n}")
    assert (found.status, found.result, found.lines) == ("ok", "7", ())
    answered = checks.all_answered(make_hosts(5), [usual, None, usual, usual, None])
    assert answered.status == "retry"
    assert "no answer from processes 1, 4 (host-0, host-1)" in answered.lines[0].text


def test_of_two_processes_the_first_is_right_and_an_absent_value_is_one():
    found = checks.differences(["a", "b"], [{"x": "1", "y": "2"}, {"x": "3"}])
    assert [line.text for line in found] == [
        "x=3 on process 1 (b), 1 on the others",
        "y=(absent) on process 1 (b), 2 on the others",
    ]


@pytest.mark.parametrize(
    ("variable", "status"),
    [("XLA_FLAGS", "fail"), ("JAX_ENABLE_X64", "fail"), ("NCCL_DEBUG", "warn")],
)
def test_variables_that_change_the_program_refuse_the_run(variable, status):
    value = f"{random.random()}"
    found = checks.environment(["a", "b", "c"], [{variable: value}, {variable: value}, {}])
    assert found.status == status
    assert f"{variable}=(absent) on process 2 (c)" in found.lines[0].text


def test_outliers_are_what_is_below_a_share_of_the_median():
    rng = np.random.default_rng()
    rates = rng.uniform(0.95, 1.05, 65) * rng.uniform(1, 1000)
    slow = sorted(rng.choice(65, 6, replace=False).tolist())
    rates[slow] *= rng.uniform(0.1, 0.7, 6)
    assert checks.outliers(rates.tolist()) == slow
    assert checks.outliers([5.0, 10.0]) == [0] and checks.outliers([10.0, 5.0]) == [1]
    assert checks.outliers([7.0]) == checks.outliers([]) == []


def test_a_slow_device_is_named_with_its_share():
    rates = [(i // 4, f"device {i} of host-{i // 4}", 700 + i) for i in range(16)]
    rates[9] = (2, "device 9 of host-2", 348.0)
    found = checks.speed("matmul", "TFLOP/s", rates)
    assert found.status == "warn"
    assert [line.processes for line in found.lines] == [(2,)]
    assert "device 9 of host-2: 348 TFLOP/s, 49% of the median" in found.lines[0].text


def test_clocks_count_only_what_is_sure():
    offsets = [(0.0, 0.0), (1.4, 0.3), (-7.25, 0.01), (1.2, 0.3), None]
    found = checks.clocks(make_hosts(5), offsets)
    assert found.status == "warn" and "7.250 s (+- 0.010)" in found.result
    assert [line.processes for line in found.lines] == [(1,), (2,)]
    assert "1.400 s (+- 0.300) ahead of process 0" in found.lines[0].text
    assert "7.250 s (+- 0.010) behind process 0" in found.lines[1].text


def test_an_unreadable_corpus_comes_before_a_comparison():
    answers = [{"c.bin": "9 bytes, digest a"}, {"c.bin": "cannot be read: no such file"}]
    found = checks.corpus(["a", "b"], answers)
    assert found.status == "fail"
    assert [line.text for line in found.lines] == ["c.bin: no such file on process 1 (b)"]
    other = [{"c.bin": "9 bytes, digest a"}, {"c.bin": "9 bytes, digest b"}]
    assert "digest b on process 1 (b)" in checks.corpus(["a", "b"], other).lines[0].text
    assert checks.corpus(["a", "b"], [{}, {}]).status == "ok"


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({}, "ok"),
        ({"log.dir": "x is not the first process's"}, "warn"),
        ({"log.dir": "x cannot be written: read-only"}, "fail"),
        ({"checkpoint.dir": "x is not the first process's"}, "fail"),
    ],
)
def test_folders_fail_where_the_run_would(wrong, status):
    assert checks.folders(["a", "b"], [{}, wrong], 2).status == status


def test_devices_that_are_missing_may_come_back_but_another_kind_stays():
    one = {"devices of a process": "8", "kind of device": "H100 (gpu)"}
    assert checks.devices(["a", "b"], [one, dict(one)]).status == "ok"
    fewer = checks.devices(["a", "b"], [one, one | {"devices of a process": "7"}])
    assert fewer.status == "retry" and "7 on process 1 (b), 8 on" in fewer.lines[0].text
    other = one | {"kind of device": "A100 (gpu)"}
    assert checks.devices(["a", "b"], [one, other]).status == "fail"
    mixed = one | {"kind of device": "A100 (gpu) and H100 (gpu)"}
    assert checks.devices(["a", "b"], [mixed, mixed]).status == "fail"


def test_memory_names_full_devices_and_gpus_of_others():
    free = [{"0": 70 << 30, "1": 9 << 30}, None, {}]
    used = [{"GPU-a": 5 << 30, "GPU-b": 1 << 20}, {"GPU-a": 5 << 30}, None]
    found = checks.memory(["a", "a", "b"], free, used, 10 << 30)
    assert [line.text for line in found.lines] == [
        "device 1 of process 0 (a) has 9.00 GiB free",
        "GPU-a on a: 5.00 GiB were in use before this run",
    ]


def make_check(status, *lines):
    of = tuple(checks.Line(text=text, processes=processes) for text, processes in lines)
    return checks.Check(name=f"the {status}", status=status, result="told", lines=of)


def test_each_process_hears_what_concerns_it_and_the_first_hears_all():
    found = [make_check("fail", ("one", (1,)), ("two", (2, 3))), make_check("warn", ("no", (1,)))]
    heard = {}
    for process in range(5):
        with pytest.raises(errors.UserError) as error:
            checks.refuse(found, process)
        assert not isinstance(error.value, errors.TransientError)
        heard[process] = str(error.value)
    assert "the fail: one; the fail: two" in heard[0]
    assert "one" in heard[1] and "two" not in heard[1] and "the fail: two" in heard[3]
    assert "see process 0's output" in heard[4]


def test_what_may_be_gone_next_time_is_transient_and_warnings_pass():
    checks.refuse([make_check("ok"), make_check("warn", ("slow", (0,)))], 0)
    with pytest.raises(errors.TransientError, match="silent"):
        checks.refuse([make_check("retry", ("silent", (3,)))], 0)
    with pytest.raises(errors.UserError) as error:
        checks.refuse([make_check("retry", ("silent", (3,))), make_check("fail", ("bad", ()))], 0)
    assert not isinstance(error.value, errors.TransientError)


def test_a_long_list_is_cut_in_the_error_and_kept_in_json():
    found = [make_check("fail", *((f"field {i}", (i,)) for i in range(50)))]
    with pytest.raises(errors.UserError, match="field 7; and 42 more") as error:
        checks.refuse(found, 0)
    assert "field 8" not in str(error.value)
    assert checks.from_json(checks.to_json(found)) == found


def test_runs_of_processes_are_told_as_ranges():
    text = checks.named([0, 1, 2, 9, 11, 12], make_hosts(16))
    assert text == "processes 0-2, 9, 11-12 (host-0, host-2, host-3)"
