"""Stretches of the training stream that are left out: which samples each step takes."""

import dataclasses
import json

import numpy as np
import pytest

from gpt3jax import errors, train
from gpt3jax.config import batch_schedule, recipe, schema
from gpt3jax.data import inspect, loader, skipped_samples
from gpt3jax.run import stopping

import corpus
import tiny


def by_hand(stages, left_out, limit):
    """Return the samples of each step, one sample at a time."""
    stream = [n for n in range(limit) if not any(a <= n < b for a, b in left_out)]
    steps, position = [], 0
    while True:
        # Sizes follow the position of the first sample that the batch could take.
        ahead = next((n for n in stream if n >= position), limit)
        size = next(size for first, size in reversed(stages) if ahead >= first)
        batch = [n for n in stream if n >= position][:size]
        if len(batch) < size:
            return steps
        steps.append(batch)
        position = batch[-1] + 1


@pytest.mark.parametrize("seed", range(20))
def test_steps_take_what_is_left_in_order(seed):
    rng = np.random.default_rng(seed)
    stages = ((0, 2), (int(rng.integers(5, 60)), 4), (int(rng.integers(60, 120)), 6))
    texts = [f"{a}:{a + n}" for a, n in zip(rng.integers(0, 150, 3), rng.integers(1, 40, 3))]  # noqa: B905
    stream = skipped_samples.from_config(schema.Data(skip_samples=tuple(texts)))
    schedule, limit = batch_schedule.BatchSchedule(stages), 200
    expected = by_hand(stages, stream.left_out, limit)
    left = {n for t in texts for n in range(*map(int, t.split(":")))}
    assert not left & {n for batch in expected for n in batch}
    n_steps, position = stream.end(schedule, 0, 0, limit)
    assert (n_steps, position) == (len(expected), expected[-1][-1] + 1)
    batches = stream.schedule(schedule)
    start = 0
    for k, batch in enumerate(expected):
        # From any position on, the rest of the run is the same.
        assert stream.end(schedule, k, start, limit) == (n_steps, position)
        first, size = stream.n_kept(start), batches.size(stream.n_kept(start))
        assert stream.numbers(first + np.arange(size)).tolist() == batch
        start = stream.position(first + size)
        assert start == batch[-1] + 1


def test_without_stretches_the_stream_is_the_run():
    stream = skipped_samples.from_config(schema.Data())
    schedule = batch_schedule.BatchSchedule(((0, 2), (7, 4)))
    assert stream.schedule(schedule) == schedule and stream.position(9) == stream.n_kept(9) == 9
    assert stream.end(schedule, 3, 6, 16) == (6, 16)


@pytest.mark.parametrize("text", ["9:9", "9:8", "9", "-1:4", "a:b", "1:2:3"])
def test_what_is_no_stretch_is_refused(repository, text):
    args = [f"--config={repository}/configs/quickstart.py", "--data.skip-samples", "3:4"]
    assert recipe.parse(args).data.skip_samples == ("3:4",)
    with pytest.raises(errors.UserError, match=rf"data\.skip_samples={text} must be A:B"):
        recipe.parse([*args, text])


def run(folder, mesh, skip, monkeypatch, stop_after=None):
    """Train 10 steps' worth of samples and return the numbers read, and the records."""
    read, get = {}, loader.Batches.__getitem__

    def spy(batches, k):
        batch = get(batches, k)
        first = int(batch["samples"].min())
        read[first] = sorted(batch["samples"].ravel().tolist())
        return batch

    with monkeypatch.context() as patched:
        patched.setattr(loader.Batches, "__getitem__", spy)
        patched.setattr(stopping.Stop, "requested", lambda _, n: n == stop_after)
        train.train(config_for(folder, mesh, skip))
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return list(read.values()), [json.loads(line) for line in lines]


def config_for(folder, mesh, skip):
    folder.mkdir(exist_ok=True)
    prefix = tiny.write_corpus(folder.parent / "corpus", 7, 300)
    return tiny.make_config(
        data={"paths": (prefix,), "split": "90,5,5", "skip_samples": skip, "prefetch": 0},
        mesh=mesh,
        model={"n_layers": 2, "d_model": 32},
        batch={"global_batch_size": 8},
        train={"n_steps": 10, "eval_interval": 0},
        checkpoint={"dir": str(folder / "checkpoints"), "save_interval": 100},
        log={"dir": str(folder / "logs"), "interval": 1},
    )


SKIP = ("20:41", "50:54")
LEFT = [n for n in range(80) if not (20 <= n < 41 or 50 <= n < 54)]


@pytest.mark.slower
def test_what_is_left_has_one_loss_on_two_meshes(tmp_path, monkeypatch):
    _, records = run(tmp_path / "whole", {"data": 8}, SKIP, monkeypatch)
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    _, others = run(tmp_path / "mixed", mesh, SKIP, monkeypatch)
    losses = [r["loss"] for r in records]
    np.testing.assert_allclose([r["loss"] for r in others], losses, rtol=1e-5)


@pytest.mark.slower
def test_a_run_takes_all_but_the_stretches_resumed_or_not(tmp_path, monkeypatch):
    read, records = run(tmp_path / "whole", {"data": 8}, SKIP, monkeypatch)
    assert read == [LEFT[i : i + 8] for i in range(0, 48, 8)]
    assert [r["consumed_samples"] for r in records] == [8, 16, 45, 57, 65, 73]
    folder = tmp_path / "resumed"
    for stop in (2, 3, 4):  # before, right after the first, right after the second stretch
        run(folder, {"data": 8}, SKIP, monkeypatch, stop)
    _, again = run(folder, {"data": 8}, SKIP, monkeypatch)
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in again] == [
        (r["step"], r["loss"], r["grad_norm"]) for r in records
    ]


@pytest.mark.slower
def test_a_stretch_may_be_left_out_at_a_restart_but_not_come_back(tmp_path, monkeypatch):
    """From step 4 on, at position 32 inside of the stretch; samples 20 to 31 were taken."""
    folder, mesh = tmp_path / "run", {"data": 8}
    run(folder, mesh, (), monkeypatch, 4)
    read, _ = run(folder, mesh, ("20:41",), monkeypatch, 6)
    assert read == [list(range(41, 49)), list(range(49, 57))]
    with pytest.raises(errors.UserError, match="left out samples 20 to 40: keep them"):
        train.train(config_for(folder, mesh, ("30:41",)))
    read, _ = run(folder, mesh, ("20:41", "70:71"), monkeypatch)
    assert read == [list(range(57, 65)), [*range(65, 70), 71, 72, 73]]


def test_the_order_and_the_schedules_are_those_of_the_whole_run(tmp_path):
    cfg = config_for(tmp_path / "run", {"data": 8}, SKIP)
    whole = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, skip_samples=()))
    parts = []
    for each in (cfg, whole):
        parts.append(tiny.prepared(each))
    assert parts[0].splits.order == parts[1].splits.order
    assert parts[0].n_samples == parts[1].n_samples == 80
    assert (parts[0].end, parts[1].end) == ((6, 73), (10, 80))


@pytest.mark.parametrize("skip", ["80:90", "0:73"])
def test_a_stretch_without_effect_or_remainder_is_refused(tmp_path, skip):
    with pytest.raises(errors.UserError, match=r"data\.skip_samples"):
        train.train(config_for(tmp_path / "run", {"data": 8}, (skip,)))


def test_inspect_shows_the_samples_of_a_step(tmp_path, monkeypatch):
    folder = corpus.write_run(tmp_path)
    monkeypatch.chdir(folder)
    cfg = corpus.config_of(folder, "--data.skip-samples", "12:30", "40:44")
    (folder / "logs").mkdir()
    (folder / "logs" / "config.json").write_text(json.dumps(schema.flatten(cfg)))
    lines = inspect.inspect(inspect.Options(config="logs/config.json", step=2))
    numbers = [int(line.split()[1][:-1]) for line in lines if line.startswith("sample ")]
    assert numbers == [8, 9, 10, 11, 30, 31, 32, 33]
