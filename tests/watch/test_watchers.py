"""The clock of a run, the account of its time, who is slow or behind, and the watchdog."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.distributed import messages
from gpt3jax.watch import goodput, phases, stragglers, watchdog


@pytest.fixture
def now(monkeypatch):
    """Return a clock whose `sleep` takes no time, from a random moment on."""
    clock = types.SimpleNamespace(now=float(np.random.default_rng().uniform(1, 1e6)))
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_a_clock_is_always_in_one_phase(now):
    clock = phases.Phases(begun=now.now - 3)
    took = np.random.default_rng().uniform(1, 9, 4)
    with clock.during(phases.HOST):
        now.sleep(took[0])
        with clock.during(phases.DATA):
            now.sleep(took[1])
            assert clock.doing() == (0, phases.DATA, pytest.approx(took[1]))
        now.sleep(took[2])
        with pytest.raises(ZeroDivisionError), clock.during(phases.SAVE):
            now.sleep(took[3])
            _ = 1 / 0
        assert clock.doing() == (0, phases.HOST, pytest.approx(0))
    expected = {"start": 3, "host": took[0] + took[2], "wait for data": took[1], "save": took[3]}
    assert clock.seconds() == pytest.approx(expected)
    assert phases.step_seconds(clock.seconds()) == pytest.approx(took[:3].sum())


def test_the_usual_step_is_the_median_and_leaves_saving_out(now):
    clock = phases.Phases()
    with clock.during(phases.HOST):
        for step, seconds in enumerate((50, 2, 7, 3), start=1):
            now.sleep(seconds)
            with clock.during(phases.SAVE):
                now.sleep(1000)
            clock.stepped(step)
    assert clock.usual_step() == pytest.approx(3)
    assert clock.doing().step == 4 and clock.last_step().own_seconds == pytest.approx(62)


def test_a_process_knows_when_it_began():
    code = "import time; time.sleep(0.3); from gpt3jax.watch import phases; "
    code += "print(time.monotonic() - phases.process_start())"
    begin = time.monotonic()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.3 < float(told.stdout) < time.monotonic() - begin + 0.02


def test_what_is_plotted_of_the_time_has_a_meaning(now):
    names = {v for k, v in vars(phases).items() if k.isupper() and isinstance(v, str)}
    assert names == phases.MEANINGS.keys()
    clock = phases.Phases()
    for phase in names:
        with clock.during(phase):
            now.sleep(1.0)
    assert goodput.Account("", clock, 0, {}).scalars().keys() == goodput.TAGS.keys()


def start_of(first, last, seconds, began=0.0, end=""):
    return goodput.Start(began, first, last, seconds, end)


def test_shares_of_a_run_that_was_killed_twice():
    """10 steps of 6 s; killed 4 steps after a save at 6, then before any step, then complete."""
    step = {phases.HOST: 1.0, phases.DEVICE: 5.0}
    starts = [
        start_of(0, 10, {"start": 7.0, **{k: 10 * v for k, v in step.items()}, phases.DATA: 2.0}),
        start_of(6, 6, {"start": 8.0, "compile": 3.0}, began=100.0),
        start_of(6, 20, {"start": 9.0, **{k: 14 * v for k, v in step.items()}}, began=111.0),
    ]
    assert goodput.shares(starts) == pytest.approx({
        "steps": 20 * 6, "lost steps": 4 * 6, "start": 24, "wait for data": 2, "compile": 3,
        "between starts": 100 - 69,
    })  # fmt: skip


def test_starts_that_led_nowhere_are_counted_in_a_row():
    nowhere, stopped = start_of(8, 11, {}), start_of(8, 9, {}, end="stopped")
    far = start_of(0, 8, {})
    assert goodput.n_fruitless([far, nowhere, nowhere], 8) == 2
    assert goodput.n_fruitless([far, nowhere, nowhere], 12) == 0
    assert goodput.n_fruitless([nowhere, stopped, nowhere], 8) == 1
    assert goodput.n_fruitless([], 0) == 0


def test_the_account_goes_on_over_starts_and_survives_damage(tmp_path, now):
    for i, text in enumerate(["", "{", '{"starts": [{"step": 1}]}']):
        if text:
            (tmp_path / "goodput.json").write_text(text)
        account = goodput.Account(str(tmp_path), phases.Phases(), 0, {})
        account.close("stopped")
        now.sleep(60)
        clock = phases.Phases()
        account = goodput.Account(str(tmp_path), clock, 0, {})
        with clock.during(phases.HOST):
            now.sleep(30 + i)
        account.update(3)
        account.close("complete")
        (first, second) = json.loads((tmp_path / "goodput.json").read_text())["starts"]
        assert (first["end"], second["end"], second["step"]) == ("stopped", "complete", 3)
        assert second["seconds"]["host"] == pytest.approx(30 + i)
        assert account.scalars()["goodput"] == pytest.approx(1)
        assert re.match(r"time: 0m3\ds in 2 starts: steps 100.0%", account.summary())


@pytest.mark.parametrize(("pause", "end"), [(0, "100.0%"), (90, "100.0%; 1m30s between starts")])
def test_time_between_starts_is_told_where_there_is_some(tmp_path, now, pause, end):
    first = start_of(0, 10, {phases.DEVICE: 30.0}, began=time.time() - 30 - pause, end="stopped")
    file = tmp_path / "goodput.json"
    file.write_text(json.dumps({"starts": [dataclasses.asdict(first)]}))
    account = goodput.Account(str(tmp_path), phases.Phases(), 10, {})
    assert account.summary() == f"time: 0m30s in 2 starts: steps {end}"


def ends(seconds, own, step):
    return {i: phases.StepEnd(step, seconds, o) for i, o in enumerate(own)}


def test_the_slowest_process_is_the_one_with_most_time_of_its_own():
    rng = np.random.default_rng()
    n, worst = int(rng.integers(2, 50)), 0
    worst = int(rng.integers(n))
    rate = rng.uniform(0.01, 0.02, n)
    rate[worst] = 0.2
    before = ends(5.0, rng.uniform(0, 3, n), 10)
    after = {
        i: phases.StepEnd(14, 5.0 + 4 * 0.5, end.own_seconds + 4 * rate[i])
        for i, end in before.items()
    }
    doing = phases.Doing(14, phases.DEVICE, 0.1)
    posts = {i: stragglers.Post(f"node{i}", doing, after[i]) for i in after}
    slow = None
    for n_times in (1, 2, 3):
        slow = stragglers.slowest(before, after, posts, slow)
        assert (slow.process, slow.host, slow.n_times) == (worst, f"node{worst}", n_times)
        assert slow.holds_up == (n_times == 3)
    assert slow.own == pytest.approx(0.2) and slow.step == pytest.approx(0.5)
    rate[worst] = 0.03
    after[worst] = phases.StepEnd(14, 7.0, before[worst].own_seconds + 4 * 0.03)
    assert stragglers.slowest(before, after, posts, slow).n_times == 0
    assert stragglers.slowest(before, before, posts) is None


@pytest.mark.parametrize(
    "doing, expected",
    [
        ([(5, phases.DEVICE), (4, phases.DATA), (5, phases.DEVICE)], [1]),
        ([(5, phases.DEVICE), (5, phases.DEVICE), (4, phases.DEVICE)], [2]),
        ([(5, phases.SAVE), (5, phases.SAVE), (5, phases.HOST)], [2]),
        ([(5, phases.SAVE), (5, phases.SAVE)], [0, 1]),
        ([(5, phases.DEVICE), (5, phases.DEVICE)], []),
        ([], []),
    ],
)
def test_who_holds_the_others_up(doing, expected):
    found = {i: phases.Doing(step, phase, 1.0) for i, (step, phase) in enumerate(doing)}
    assert stragglers.held_up_by(found) == expected


HANG = """
import threading, time
from gpt3jax.config import schema
from gpt3jax.watch import phases, stragglers, watchdog
clock = phases.Phases()
options = schema.Watchdog(step_multiple=3, min_seconds=1, slow_phase_seconds=4)
watchdog.Watchdog(options, clock, stragglers.Peers(clock, 0, 1, 0.2), 0, 0.2)
def usual_step():
    time.sleep(0.1)
with clock.during(phases.HOST):
    for step in range(5):
        usual_step()
        clock.stepped(step)
    with clock.during(phases.SAVE):
        time.sleep(1.5)
    def stuck_here():
        with clock.during(phases.DATA):
            {stuck}
    stuck_here()
"""
HOLDS_THE_GIL = "import ctypes; ctypes.PyDLL(None).sleep(60)"


def test_a_silent_process_is_named_with_what_it_did_last(monkeypatch):
    """Its own watchdog may have ended it before the others look."""
    ticks = itertools.count()
    silent = ("host1", (6, phases.DATA, 2.5), None, 0)

    def posted(_folder):
        n = next(ticks)
        running = {"0": ("host0", (7, phases.DEVICE, 2.5), None, n)}
        return {"0": json.dumps(running), "1": json.dumps({"1": silent})}

    monkeypatch.setattr(messages, "post", lambda *_: None)
    monkeypatch.setattr(messages, "posted", posted)
    peers = stragglers.Peers(phases.Phases(), 0, 2, every=0.02)
    peers.start()
    end = time.monotonic() + 30
    before = "before, it was in 'wait for data' after step 6"
    expected = rf"process 1 \(host1\) has not been heard of for \d+ s; {before}"
    while not re.fullmatch(expected, peers.behind()[0]):
        assert time.monotonic() < end, peers.behind()
        time.sleep(0.01)
    peers.close()


@pytest.mark.parametrize("stuck", ["time.sleep(60)", HOLDS_THE_GIL])
def test_a_hang_is_told_with_its_place_and_ended(stuck):
    begin = time.monotonic()
    code = HANG.format(stuck=stuck)
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert told.returncode == errors.RETRY and time.monotonic() - begin < 20
    assert "in stuck_here" in told.stderr
    if stuck != HOLDS_THE_GIL:
        assert re.search(
            r"hang: process 0 has been in 'wait for data' for \d s after step 4, the limit is 1 s",
            told.stderr,
        )


def test_limits_follow_the_usual_step(now):
    clock = phases.Phases()
    options = schema.Watchdog(step_multiple=5, min_seconds=20, slow_phase_seconds=900)
    dog = watchdog.Watchdog(options, clock, stragglers.Peers(clock, 0, 1, 1.0), 0, 1e6)
    assert dog.limit(phases.DEVICE) == 900, "nothing is usual before there are steps"
    with clock.during(phases.DEVICE):
        for step in range(3):
            now.sleep(7)
            clock.stepped(step)
    assert dog.limit(phases.DEVICE) == pytest.approx(35) and dog.limit(phases.SAVE) == 900
    dog.close()
